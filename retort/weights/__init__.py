"""Weights of steps: gates, and weights made of quantities.

Some exports are no weights: `acceptance_probability` is a quantity, `Confidence` and `Zones` make several parts from
one statistic, `position_weights` and `effective_sample_size` are functions of tensors. Four modules serve a single
method each and are not exported here: `agreement` (UniSD), `calibration` (Uni-OPD), `direction` (DASD) and `privilege`
(DOPD).
"""

from retort.weights.acceptance import acceptance_probability, accepted
from retort.weights.confidence import Confidence
from retort.weights.contract import on_contract
from retort.weights.corrections import effective_sample_size, engine_correction
from retort.weights.directed import directed_ratio
from retort.weights.gates import above, below, both
from retort.weights.importance import truncated_rollout_ratio, truncated_student_ratio, truncated_teacher_ratio
from retort.weights.positions import after, late, position_weights
from retort.weights.teachability import release
from retort.weights.zones import Zones

__all__ = [
    "Confidence",
    "Zones",
    "above",
    "acceptance_probability",
    "accepted",
    "after",
    "below",
    "both",
    "directed_ratio",
    "effective_sample_size",
    "engine_correction",
    "late",
    "on_contract",
    "position_weights",
    "release",
    "truncated_rollout_ratio",
    "truncated_student_ratio",
    "truncated_teacher_ratio",
]
