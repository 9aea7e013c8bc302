"""How much each step counts: gates and the quantities they look at."""

from retort.weights.entropy import sampled_reverse_kl, student_entropy, teacher_entropy, teacher_top_mass
from retort.weights.importance import truncated_rollout_ratio, truncated_teacher_ratio
from retort.weights.ops import above
from retort.weights.overlap import entropy_gap, overlap_advantage, overlap_mass, overlap_ratio, overlap_teacher_mass

__all__ = [
    "above",
    "entropy_gap",
    "overlap_advantage",
    "overlap_mass",
    "overlap_ratio",
    "overlap_teacher_mass",
    "sampled_reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "teacher_top_mass",
    "truncated_rollout_ratio",
    "truncated_teacher_ratio",
]
