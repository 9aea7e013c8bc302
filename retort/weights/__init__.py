"""How much each step counts: gates and the quantities they look at."""

from retort.weights.entropy import sampled_reverse_kl, student_entropy, teacher_entropy, teacher_top_mass
from retort.weights.importance import truncated_rollout_ratio, truncated_teacher_ratio
from retort.weights.ops import above

__all__ = [
    "above",
    "sampled_reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "teacher_top_mass",
    "truncated_rollout_ratio",
    "truncated_teacher_ratio",
]
