"""How much each step counts: gates and the quantities they look at."""

from retort.weights.confidence import Confidence
from retort.weights.contract import cliff, masses, on_contract, student_tail, threshold_weight
from retort.weights.corrections import effective_sample_size, engine_correction
from retort.weights.directed import directed_ratio, log_ratio_size, outside_bound
from retort.weights.entropy import sampled_reverse_kl, student_entropy, teacher_entropy, teacher_top_mass
from retort.weights.gradient_variance import gradient_variance
from retort.weights.importance import truncated_rollout_ratio, truncated_student_ratio, truncated_teacher_ratio
from retort.weights.ops import above, below, both, stored_quantity
from retort.weights.overlap import entropy_gap, overlap_advantage, overlap_mass, overlap_ratio, overlap_teacher_mass
from retort.weights.positions import after, late, position_weights
from retort.weights.teachability import release, teacher_margin
from retort.weights.zones import Zones

__all__ = [
    "Confidence",
    "Zones",
    "above",
    "after",
    "below",
    "both",
    "cliff",
    "directed_ratio",
    "effective_sample_size",
    "engine_correction",
    "entropy_gap",
    "gradient_variance",
    "late",
    "log_ratio_size",
    "masses",
    "on_contract",
    "outside_bound",
    "overlap_advantage",
    "overlap_mass",
    "overlap_ratio",
    "overlap_teacher_mass",
    "position_weights",
    "release",
    "sampled_reverse_kl",
    "stored_quantity",
    "student_entropy",
    "student_tail",
    "teacher_entropy",
    "teacher_margin",
    "teacher_top_mass",
    "threshold_weight",
    "truncated_rollout_ratio",
    "truncated_student_ratio",
    "truncated_teacher_ratio",
]
