"""Who writes, how often and how hot: the part of a method that comes before any loss."""

from __future__ import annotations

from dataclasses import dataclass

from retort.errors import UserError


@dataclass(frozen=True)
class RolloutPlan:
    """Single-turn writing by the student, mixed if asked with given answers.

    Attributes:
        samples: Rollouts per prompt.
        temperature: Of sampling.
        top_p: Nucleus of sampling; 1 is the student's own distribution.
        on_policy_fraction: Probability that a prompt is answered by the student; otherwise its `response` from the data
            is used (once, whatever `samples` says).
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    on_policy_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, not {self.samples}")
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, not {self.temperature} (greedy rollouts cannot teach)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"on_policy_fraction must lie in [0, 1], not {self.on_policy_fraction}")
