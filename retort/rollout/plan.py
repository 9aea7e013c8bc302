"""Who writes, how often and how hot: the part of a method that comes before any loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from retort.core.schedules import Dial, Reading, line
from retort.errors import UserError

Source = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True)
class Replay:
    """Part of the student's answers are not written anew but are some that it wrote before.

    From DistiLLM, arXiv 2402.03898.

    Attributes:
        capacity: Visits to a prompt that are kept, with all their samples; the oldest makes room. Until there are that
            many, every answer is new.
        fresh: Share of the student's visits that are written anew; the published one falls from 1 to 0.
    """

    capacity: int = 1000
    fresh: Dial = field(default_factory=lambda: line(1.0, 0.0))

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"replay capacity must be at least 1, not {self.capacity}")


@dataclass(frozen=True)
class EasyToHard:
    """Prompts by difficulty, 1 minus the first student's pass rate: in its order, or balanced. It needs a verifier.

    From SEAD, arXiv 2606.28562, and Uni-OPD, arXiv 2605.03677 (`balanced`). The pass rates are measured before the
    first step and kept in the run's folder; they do not follow the student.

    Attributes:
        kind: `sorted` goes through all prompts once, easiest first, by difficulty plus noise (what the paper ran);
            `gated` draws each prompt at random among those of a difficulty up to min(1, start (1 + s/S)^power), at
            step s of S (what its text says), with the easiest where nothing is easy enough; `balanced` draws from all
            at every step, and more often, up to `most` times, those of a pass count that is rare, but not those that
            all answers or none solved. Uni-OPD gives no numbers: these odds are a reconstruction.
        samples: Answers per prompt that a pass rate is measured on.
        noise: Standard deviation of what is added to a difficulty before `sorted` sorts.
        start: Of `gated`. The paper gives neither it nor `power`; these reach every prompt at the end.
        power: Of `gated`.
        most: Of `balanced`: the highest odds of a prompt.
    """

    kind: Literal["sorted", "gated", "balanced"] = "sorted"
    samples: int = 8
    noise: float = 0.02
    start: float = 0.5
    power: float = 1.0
    most: float = 4.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"easy-to-hard: samples must be at least 1, not {self.samples}")
        if self.most < 1:
            raise UserError(f"easy-to-hard: most must be at least 1, not {self.most}")
        if self.noise < 0 or self.power < 0 or not 0 <= self.start <= 1:
            raise UserError("easy-to-hard: noise and power must not be negative, and start must lie in [0, 1]")

    def odds(self, difficulty: Sequence[float]) -> list[float]:
        """How much more often than the most frequent kind each prompt is drawn by `balanced`, from 1 to `most`."""
        passed = [round((1.0 - value) * self.samples) for value in difficulty]
        count = Counter(passed)
        usual, ends = max(count.values(), default=0), (0, self.samples)
        return [1.0 if own in ends else min(self.most, usual / count[own]) for own in passed]

    def gate(self, step: int, steps: int) -> float:
        """The difficulty up to which prompts may be drawn at a step; it never falls."""
        return min(1.0, self.start * (1.0 + step / max(1, steps)) ** self.power)


@dataclass(frozen=True)
class RolloutPlan:
    """Single-turn writing by the student, mixed if asked with answers of the teacher or of the data.

    Attributes:
        samples: Rollouts per prompt (one, where the data answers).
        temperature: Of sampling, whoever writes.
        top_p: Nucleus of sampling; 1 is the writer's own distribution.
        on_policy_fraction: Probability that a prompt is answered by the student; otherwise by `off_policy`. 0 for
            methods that learn on somebody else's prefixes.
        off_policy: Who answers the others: the `response` of the data, or the teacher, in its own chat rendering. What
            the teacher wrote is then read as an answer to the student's rendering, with the student's stop token.
        keep: The teacher answers a prompt once, and that answer serves whenever the run comes back to the prompt.
        attempts: How often the teacher may begin again where it did not come to an end within the token limit; an
            answer cut short in its last attempt is left out. None: cut answers are used as they are.
        horizon: Longest answer, tokens, in writing and in the loss; never more than the run's limit. None: that limit.
        replay: The student's answers are partly old ones.
        order: Of prompts: shuffled anew every time through the data, or by difficulty.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    on_policy_fraction: Dial = 1.0
    off_policy: Literal["dataset", "teacher"] = "dataset"
    keep: bool = False
    attempts: int | None = None
    horizon: Dial | None = None
    replay: Replay | None = None
    order: EasyToHard | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, not {self.samples}")
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, not {self.temperature} (greedy rollouts cannot teach)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], not {self.top_p}")
        if isinstance(self.on_policy_fraction, int | float) and not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"on_policy_fraction must lie in [0, 1], not {self.on_policy_fraction}")
        if self.attempts is not None and self.attempts < 1:
            raise UserError(f"attempts must be at least 1, not {self.attempts}")
        if isinstance(self.horizon, int | float) and self.horizon < 1:
            raise UserError(f"horizon must be at least 1 token, not {self.horizon}")

    @property
    def sources(self) -> frozenset[Source]:
        """Everybody who may answer in a run."""
        share = self.on_policy_fraction
        found: set[Source] = set() if share == 0 else {"student"}
        return frozenset(found if share == 1 else {*found, self.off_policy})

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The numbers of controllers that it reads."""
        dials = (self.on_policy_fraction, self.horizon, self.replay.fresh if self.replay else None)
        return tuple(dial for dial in dials if isinstance(dial, Reading))


def plan_summary(plan: RolloutPlan, prompts: int) -> str:
    """One line on who writes, for the start-up summary."""
    share, other = plan.on_policy_fraction, "the teacher" if plan.off_policy == "teacher" else "the data"
    mixed = ""
    if share == 0:
        mixed = f", answered by {other}"
    elif isinstance(share, Reading):
        mixed = f", as many as {share} says (else by {other})"
    elif not isinstance(share, int | float):
        mixed = f", a share that moves (else by {other})"
    elif share != 1:
        mixed = f", {share:.0%} of prompts (else {other}'s answer)"
    replayed = f", replayed from {plan.replay.capacity} visits" if plan.replay else ""
    kind = None if plan.order is None else plan.order.kind
    ordered = "" if kind is None else ", balanced by difficulty" if kind == "balanced" else ", easy to hard"
    return f"{prompts} prompts x {plan.samples} at temperature {plan.temperature:g}{mixed}{replayed}{ordered}"
