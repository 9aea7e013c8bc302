"""The settings of Uni-OPD in groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retort.advantages.outcome import Scope
from retort.method import Unbounded


@dataclass(frozen=True)
class Balance:
    """Right and wrong rollouts that are kept.

    Attributes:
        ratio: Right over wrong rollouts that are kept; the surplus is drawn by the run's seed and step. 0 keeps only
            the wrong ones of a mixed group, infinity only the right ones. Null: all are kept.
        scope: Set that is balanced: each prompt's rollouts (the paper's scripts), or the batch.
    """

    ratio: Unbounded | None = field(default=1.0, metadata={"setting": "balance"})
    scope: Scope = field(default="group", metadata={"setting": "balance_scope"})


@dataclass(frozen=True)
class Margin:
    """Margin by which the teacher is made to prefer right rollouts to wrong ones.

    Attributes:
        size: m, nats. Large margins make the method REINFORCE with a reward of +1 and -1.
        gap: `mean`, or `minmax`: of the lowest right and the highest wrong (the paper's equations).
        scope: Set that is compared: each prompt's rollouts, or the batch.
        direction: `both` (Spread), or the whole shift on the right ones, up (Lift), or on the wrong ones, down.
        retained: Least share of a group that `mask` keeps.
        over: Rollouts whose log-ratios are compared: all, as in the code, or the balanced ones.
    """

    size: Unbounded = field(default=0.4, metadata={"setting": "margin"})
    gap: Literal["mean", "minmax"] = field(default="mean", metadata={"setting": "margin_gap"})
    scope: Scope = field(default="group", metadata={"setting": "margin_scope"})
    direction: Literal["both", "correct_up", "incorrect_down"] = field(
        default="both", metadata={"setting": "margin_direction"}
    )
    retained: float = field(default=0.25, metadata={"setting": "margin_retained"})
    over: Literal["all", "kept"] = field(default="all", metadata={"setting": "margin_over"})


@dataclass(frozen=True)
class Clip:
    """PPO's clip.

    Attributes:
        low: PPO's epsilon below 1.
        high: PPO's epsilon above 1.
    """

    low: float = field(default=0.2, metadata={"setting": "clip_low"})
    high: float = field(default=0.28, metadata={"setting": "clip_high"})
