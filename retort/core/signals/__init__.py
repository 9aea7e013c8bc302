"""Teacher signals of every kind, and their rows for a chunk of steps."""

from retort.core.signals.base import SignalRows, TeacherSignal, as_compute
from retort.core.signals.by_ids import Candidates, Sampled, TopK, entropy_lower_bound
from retort.core.signals.dense import Dense, DistributionRows, Factors, entropy

__all__ = [
    "Candidates",
    "Dense",
    "DistributionRows",
    "Factors",
    "Sampled",
    "SignalRows",
    "TeacherSignal",
    "TopK",
    "as_compute",
    "entropy",
    "entropy_lower_bound",
]
