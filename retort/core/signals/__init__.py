"""Teacher signals of every kind, and their rows for a chunk of steps."""

from retort.core.distribution import as_compute
from retort.core.signals.ahead import Ahead
from retort.core.signals.base import SignalRows, TeacherSignal
from retort.core.signals.by_ids import Candidates, Sampled, TopK, entropy_lower_bound
from retort.core.signals.dense import Dense, DistributionRows, Factors, entropy
from retort.core.signals.end_to_end import end_to_end
from retort.core.signals.gaussian import Gaussian
from retort.core.signals.several import Differing, all_valid, arithmetic, disagreement, joined, listed
from retort.core.signals.spans import LONGEST_UNIT, SPAN_KINDS, Spans, columns_of, matched, unit_columns
from retort.core.signals.theirs import PositionInUnit, PrefixTable, TeacherTokens
from retort.core.signals.units import Units

__all__ = [
    "LONGEST_UNIT",
    "SPAN_KINDS",
    "Ahead",
    "Candidates",
    "Dense",
    "Differing",
    "DistributionRows",
    "Factors",
    "Gaussian",
    "PositionInUnit",
    "PrefixTable",
    "Sampled",
    "SignalRows",
    "Spans",
    "TeacherSignal",
    "TeacherTokens",
    "TopK",
    "Units",
    "all_valid",
    "arithmetic",
    "as_compute",
    "columns_of",
    "disagreement",
    "end_to_end",
    "entropy",
    "entropy_lower_bound",
    "joined",
    "listed",
    "matched",
    "unit_columns",
]
