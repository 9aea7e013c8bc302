"""The rollout plan of a method: which model generates, how often, and at which temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from retort.core.schedules import ControllerOutput, ScalarOrSchedule, line
from retort.errors import UserError

Source = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True)
class Replay:
    """A replay buffer: part of the student's completions are not generated anew but taken from earlier ones.

    From DistiLLM, arXiv 2402.03898.

    Attributes:
        capacity: Visits to a prompt that are kept, with all their samples; the oldest is dropped first. Until there are
            that many, every completion is new.
        fresh: Share of the student's visits that are generated anew; the published one falls from 1 to 0.
    """

    capacity: int = 1000
    fresh: ScalarOrSchedule = field(default_factory=lambda: line(1.0, 0.0))

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"replay capacity must be at least 1, not {self.capacity}")


@dataclass(frozen=True)
class EasyToHard:
    """Prompts by difficulty, 1 minus the first student's pass rate: in order, or balanced. It needs a verifier.

    From SEAD, arXiv 2606.28562, and Uni-OPD, arXiv 2605.03677 (`balanced`). The pass rates are measured before the
    first step and kept in the run's folder; they do not follow the student.

    Attributes:
        kind: `sorted` goes through all prompts once, easiest first, by difficulty plus noise (as the paper's code);
            `gated` draws each prompt at random among those of a difficulty up to min(1, start (1 + s/S)^power), at step
            s of S (as its text), with the easiest where nothing is easy enough; `balanced` draws from all at every
            step, and more often, up to `most` times, those of a pass count that is rare, but not those that all
            completions or none solved. Uni-OPD gives no numbers: these odds are a reconstruction.
        samples: Completions per prompt for a pass rate.
        noise: Standard deviation of the noise that `sorted` adds to a difficulty.
        start: Start of `gated`. The paper gives neither it nor `power`; these reach every prompt at the end.
        power: Exponent of `gated`.
        most: The highest odds of a prompt under `balanced`.
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
class TurnCurriculum:
    """The turns of an episode that the student plays: a horizon that grows with the run, or one turn that is drawn.

    From TCOD, arXiv 2604.24005, and ReOPD, arXiv 2607.04763 (`drawn`).

    Attributes:
        kind: `forward`: the student plays the first turns of an episode, at most so many as the horizon. `backward`: an
            expert plays all turns of its way but the last ones, so many as the horizon, and the student goes on from
            there to the end; it needs an environment with an expert. `drawn`: an expert plays the first t turns, and
            the student the one after them; t is drawn anew for each episode, with odds `decay` to the power of t.
        start: The horizon of the first batch, turns.
        every: Batches from one further turn to the next. (The paper calls this a rate of growth; a larger one grows
            more slowly.)
        decay: Odds of a turn against those of the one before it, of `drawn`.
    """

    kind: Literal["forward", "backward", "drawn"] = "forward"
    start: int = 1
    every: int = 2
    decay: float = 0.6

    def __post_init__(self) -> None:
        if self.start < 1:
            raise UserError(f"turn curriculum: start must be at least 1 turn, not {self.start}")
        if self.every < 1:
            raise UserError(f"turn curriculum: every must be at least 1 batch, not {self.every}")
        if not 0.0 < self.decay <= 1.0:
            raise UserError(f"turn curriculum: decay must lie in (0, 1], not {self.decay:g}")

    def horizon(self, done: int) -> int:
        """Turns after so many batches; an episode's end, or the length of the expert's way, limits them."""
        return 1 if self.kind == "drawn" else self.start + done // self.every


@dataclass(frozen=True)
class RolloutPlan:
    """A plan: the student generates, if asked mixed with completions of the teacher or of the data.

    Attributes:
        samples: Rollouts per prompt (one, where the data give the completion).
        temperature: Temperature of sampling, whichever model generates.
        top_p: Probability mass of the nucleus; 1 is the model's own distribution.
        on_policy_fraction: Probability that the student generates the completion of a prompt; otherwise `off_policy`
            does. 0 for methods that learn on another source's prefixes.
        off_policy: Source of the other completions: the `response` of the data, or the teacher, in its own chat
            rendering. The teacher's completion then follows the student's rendering, with the student's stop token.
        keep: Whether the teacher completes a prompt once, and that completion is used again at every later visit.
        attempts: How often the teacher may try a completion that does not end within the token limit; one that is
            truncated in its last attempt is left out. None: truncated completions are used as they are.
        horizon: Longest completion, tokens, in generation and in the loss; never more than the run's limit. None: that
            limit.
        replay: The replay buffer of the student's completions, if any.
        order: Order of prompts: shuffled anew every time through the data, or by difficulty.
        curriculum: A horizon of turns that grows, in episodes of many turns.
        prompt_view: The view whose prompt the student reads while it writes; its completion then follows its own
            prompt, as if it had read that. None: it reads its own.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    on_policy_fraction: ScalarOrSchedule = 1.0
    off_policy: Literal["dataset", "teacher"] = "dataset"
    keep: bool = False
    attempts: int | None = None
    horizon: ScalarOrSchedule | None = None
    replay: Replay | None = None
    order: EasyToHard | None = None
    curriculum: TurnCurriculum | None = None
    prompt_view: str | None = None

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
        """All sources of completions in a run."""
        share = self.on_policy_fraction
        found: set[Source] = set() if share == 0 else {"student"}
        return frozenset(found if share == 1 else {*found, self.off_policy})

    @property
    def controller_outputs(self) -> tuple[ControllerOutput, ...]:
        """The controller outputs that the plan reads."""
        scalars = (self.on_policy_fraction, self.horizon, self.replay.fresh if self.replay else None)
        return tuple(scalar for scalar in scalars if isinstance(scalar, ControllerOutput))


def plan_summary(plan: RolloutPlan, prompts: int) -> str:
    """One line about the plan, for the start-up summary."""
    share, other = plan.on_policy_fraction, "the teacher" if plan.off_policy == "teacher" else "the data"
    mixed = ""
    if share == 0:
        mixed = f", completions by {other}"
    elif isinstance(share, ControllerOutput):
        mixed = f", a share given by {share} (else by {other})"
    elif not isinstance(share, int | float):
        mixed = f", a share that moves (else by {other})"
    elif share != 1:
        mixed = f", {share:.0%} of prompts (else {other}'s response)"
    replayed = f", replayed from {plan.replay.capacity} visits" if plan.replay else ""
    kind = None if plan.order is None else plan.order.kind
    ordered = "" if kind is None else ", balanced by difficulty" if kind == "balanced" else ", easy to hard"
    turns = ""
    if plan.curriculum is not None:
        whose = "first turns" if plan.curriculum.kind == "forward" else "turns after an expert's"
        turns = f", {plan.curriculum.start} {whose} and one more every {plan.curriculum.every} batches"
        if plan.curriculum.kind == "drawn":
            turns = f", one turn of each episode, after an expert's (odds of {plan.curriculum.decay:g} a turn)"
    under = "" if plan.prompt_view is None else f", written under the prompt of view '{plan.prompt_view}'"
    told = f"{mixed}{replayed}{ordered}{turns}{under}"
    return f"{prompts} prompts x {plan.samples} at temperature {plan.temperature:g}{told}"
