"""Numbers per step that gates test, that weights are made of, and that a run watches; none is a weight itself.

Three exports from `contract.py` serve `listopd` and are no quantities: `masses` makes statistics (`Stat`) of the whole
batch, and two functions compute a float from them, `threshold_weight` and `weight_below_cliff`.
The formulas behind them are in `extrapolation.py`, which is not exported here.
"""

from retort.quantities.contract import cliff, masses, student_tail, threshold_weight, weight_below_cliff
from retort.quantities.disagreement import teacher_disagreement
from retort.quantities.entropy import (
    sampled_reverse_kl,
    student_entropy,
    teacher_entropy,
    teacher_entropy_bound,
    teacher_top_mass,
)
from retort.quantities.gradient_variance import gradient_variance
from retort.quantities.log_ratio import engine_gap, log_ratio_size, outside_bound
from retort.quantities.margin import teacher_margin
from retort.quantities.overlap import entropy_gap, overlap_advantage, overlap_mass, overlap_ratio, overlap_teacher_mass
from retort.quantities.residual import residual_variance, sampled_tail
from retort.quantities.stored import stored_quantity
from retort.quantities.units import matched_tokens
from retort.quantities.variance import student_variance, teacher_variance

__all__ = [
    "cliff",
    "engine_gap",
    "entropy_gap",
    "gradient_variance",
    "log_ratio_size",
    "masses",
    "matched_tokens",
    "outside_bound",
    "overlap_advantage",
    "overlap_mass",
    "overlap_ratio",
    "overlap_teacher_mass",
    "residual_variance",
    "sampled_reverse_kl",
    "sampled_tail",
    "stored_quantity",
    "student_entropy",
    "student_tail",
    "student_variance",
    "teacher_disagreement",
    "teacher_entropy",
    "teacher_entropy_bound",
    "teacher_margin",
    "teacher_top_mass",
    "teacher_variance",
    "threshold_weight",
    "weight_below_cliff",
]
