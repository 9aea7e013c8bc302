"""Advantages: the factor of each step's policy gradient, from the teacher or from the outcome.

Some exports are helpers and no advantages: `proximal_log_ratio` is a quantity, `lower_clip` a bound on the log-ratio,
and `graded`, `group_means`, `length_bonus`, `members` and `per_rollout` are what advantages from the outcome are made
of; `advantage_sum` takes each `Summand`.
"""

from retort.advantages.closed_form import minus_divergence
from retort.advantages.log_ratio import (
    capped_log_ratio,
    clipped_log_ratio,
    extrapolated_log_ratio,
    log_ratio,
    lower_clip,
    power_difference,
    return_to_go,
    tanh_log_ratio,
)
from retort.advantages.outcome import (
    graded,
    group_advantage,
    group_means,
    length_bonus,
    members,
    per_rollout,
    running_advantage,
    stored_advantage,
)
from retort.advantages.proximal import proximal_log_ratio, proximal_return
from retort.advantages.total import Summand, advantage_sum

__all__ = [
    "Summand",
    "advantage_sum",
    "capped_log_ratio",
    "clipped_log_ratio",
    "extrapolated_log_ratio",
    "graded",
    "group_advantage",
    "group_means",
    "length_bonus",
    "log_ratio",
    "lower_clip",
    "members",
    "minus_divergence",
    "per_rollout",
    "power_difference",
    "proximal_log_ratio",
    "proximal_return",
    "return_to_go",
    "running_advantage",
    "stored_advantage",
    "tanh_log_ratio",
]
