"""Prompts, and the rollouts that were generated for them. Axis letters: see `retort.core`.

`Rollout.cut` shortens a rollout. `Source._cut` (`retort.train.source.source`) calls it for rollouts of the teacher and
of the replay buffer; new ones end at the limit while they are generated.
Nothing here is mutated after construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.core.steps import Steps


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the speaker.
        content: Text of the turn; empty for a turn that only calls tools.
        extra: Other fields of the turn that a chat template may read, JSON values by their names there: `tool_calls`,
            `tool_call_id`, `name`, `reasoning_content`, ...
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=lambda: {}, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Prompt:
    """A problem for the student.

    Attributes:
        id: Stable name of the row; random streams are keyed by it.
        messages: The conversation so far. A row's plain `prompt` is one user message.
        plain: True if the row had a plain `prompt`: it is rendered as bare text where the tokenizer has no
            chat template (a base model), whereas `messages` need a template.
        answer: The reference answer that a verifier compares with; never in the context of a rollout.
        response: A given response to learn from off-policy, if the data has one.
        privileged: Texts that only a teacher may see (solution, hint, ...); never in the context of a rollout.
        clean: The conversation without the text that must not change the answer (paired prompts); for a teacher only,
            too.
        domain: Free label, for metrics by domain.
        tools: The functions that the model may call, as JSON schemas; a chat template renders them.
    """

    id: str
    messages: tuple[Message, ...]
    plain: bool = True
    answer: str | None = None
    response: str | None = None
    privileged: Mapping[str, str] = field(default_factory=lambda: {})
    clean: tuple[Message, ...] | None = None
    domain: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    def shown(self, column: str) -> str | None:
        """The text of a column that a view may show; `demonstration` falls back to the given response."""
        if column == "clean":
            return None if self.clean is None else "\n".join(message.content for message in self.clean)
        given = {"answer": self.answer, "response": self.response, **self.privileged}
        return given.get(column) or (self.response if column == "demonstration" else None)

    @property
    def text(self) -> str:
        """The bare text: all contents, one after another."""
        return "\n".join(message.content for message in self.messages)


class Status(StrEnum):
    """How a rollout ended."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ERROR = "error"


@dataclass(frozen=True)
class Outcome:
    """What came of one turn of an episode.

    Attributes:
        messages: What the environment replied. The model read it before its next turn, if it had one.
        reward: Reward of the turn; None where the environment grades nothing.
        measures: What else was measured of the turn, by name.
    """

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    measures: Mapping[str, float] = field(default_factory=lambda: {})


@dataclass(frozen=True)
class Rollout:
    """A completion of a prompt, token by token, with the author of every token.

    Attributes:
        prompt: The prompt that it completes.
        sequence: All tokens in order, and the action mask: which of them the policy decided.
        turn_A: Index of the turn of each decided token, int64; None for a single turn.
        engine_logp_A: Log-prob that the rollout engine reported for each decided token, nats; None for data.
        policy_version: Optimizer steps that the student had taken when it generated this.
        member: Index among the samples of its prompt; rollouts of one visit to a prompt are a group.
        visit: How many times the run had been through the data when it came to this prompt.
        status: How it ended.
        source: Who generated it: the student, a teacher, or the data.
        text: Text of the decided tokens.
        reward: The verifier's grade, if it was graded.
        reward_parts: The reward by component.
        feedback: The verifier's words on what is wrong with it, if any; for views that show it to a teacher.
        measures: What its environment measured besides, by name, such as `success`; empty without one.
        outcomes: What came of each turn, in order; a last turn that was cut off has none. They are for records, and for
            teachers with another tokenizer, which read the messages of replies in their own. Empty for a single turn
            without an environment.
    """

    prompt: Prompt
    sequence: TokenSequence
    turn_A: Tensor | None = None
    engine_logp_A: Tensor | None = None
    policy_version: int = 0
    member: int = 0
    visit: int = 0
    status: Status = Status.COMPLETED
    source: Literal["student", "teacher", "dataset"] = "student"
    text: str = ""
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=lambda: {})
    feedback: str = ""
    measures: Mapping[str, float] = field(default_factory=lambda: {})
    outcomes: tuple[Outcome, ...] = ()

    def __post_init__(self) -> None:
        if self.turn_A is not None and len(self.turn_A) != self.steps:
            raise ValueError(f"{len(self.turn_A)} turns for {self.steps} decided tokens")
        if self.engine_logp_A is not None and len(self.engine_logp_A) != self.steps:
            raise ValueError(f"{len(self.engine_logp_A)} engine log-probs for {self.steps} decided tokens")
        if self.engine_logp_A is not None and bool(self.engine_logp_A.isnan().any()):
            raise ValueError("an engine's log-prob is NaN; leave out those of a rollout that has none")

    @property
    def steps(self) -> int:
        """Number of decision steps (decided tokens)."""
        return self.sequence.steps

    @property
    def action_ids(self) -> list[int]:
        """Ids of the decided tokens, [A]."""
        return self.sequence.actions_A.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def cut(self, steps: int, text: str) -> Rollout:
        """The rollout up to the first `steps` decisions, as truncated; itself where it has no more.

        Args:
            steps: Number of decisions that stay.
            text: Text of the decisions that stay.
        """
        if self.steps <= steps:
            return self
        return replace(
            self,
            sequence=self.sequence.cut(steps),
            turn_A=None if self.turn_A is None else self.turn_A[:steps],
            engine_logp_A=None if self.engine_logp_A is None else self.engine_logp_A[:steps],
            status=Status.TRUNCATED,
            text=text,
            outcomes=() if self.turn_A is None else self.outcomes[: int(self.turn_A[steps - 1])],
        )


#: All rollouts of one visit to one prompt: the unit that is graded and scored.
Group = tuple[Rollout, ...]


def in_groups(rollouts: Sequence[Rollout]) -> list[Group]:
    """Splits rollouts into visits to a prompt, whose rollouts are neighbours; joined, they keep the order given."""
    visits = groupby(rollouts, key=lambda rollout: (rollout.prompt.id, rollout.visit))
    return [tuple(own) for _, own in visits]


@dataclass(frozen=True)
class Pack:
    """The decision steps of several rollouts, end to end, without padding.

    Attributes:
        rollouts: The R rollouts, in order.
        steps: The table of their N steps.
        group_R: Index of each rollout's group (one visit to one prompt), int64.
    """

    rollouts: tuple[Rollout, ...]
    steps: Steps
    group_R: Tensor

    def __len__(self) -> int:
        """N, the number of decision steps."""
        return len(self.steps)

    @property
    def reward_R(self) -> Tensor:
        """Reward of each rollout, [R], float64; NaN where it is not graded."""
        return _rewards(self.rollouts)

    def groups(self) -> list[tuple[Rollout, ...]]:
        """For each rollout, all of its group in order of member, itself included.

        A visit that was drawn twice for a replay is there twice; its members are each other's siblings only once.
        """
        found: dict[int, dict[int, Rollout]] = {}
        numbers = [int(group) for group in self.group_R]
        for rollout, group in zip(self.rollouts, numbers, strict=True):
            found.setdefault(group, {}).setdefault(rollout.member, rollout)
        ordered = {group: tuple(own[member] for member in sorted(own)) for group, own in found.items()}
        return [ordered[group] for group in numbers]

    def steps_of(self, rollouts: Sequence[int]) -> Tensor:
        """Indices in N of the steps of some rollouts, in the order given."""
        chosen = torch.tensor(rollouts, dtype=torch.long)
        steps_R = torch.bincount(self.steps.rollout_N, minlength=len(self.rollouts))
        starts_R = steps_R.cumsum(0) - steps_R
        steps, starts = steps_R[chosen], starts_R[chosen]
        # A step's index is its rollout's start in N, plus its offset from its rollout's start among the chosen steps.
        behind = torch.arange(int(steps.sum())) - torch.repeat_interleave(steps.cumsum(0) - steps, steps)
        return torch.repeat_interleave(starts, steps) + behind

    @staticmethod
    def of(rollouts: tuple[Rollout, ...] | list[Rollout]) -> Pack:
        """Packs rollouts in the order given."""
        if not rollouts:
            raise ValueError("cannot pack zero rollouts")
        steps_R = torch.tensor([rollout.steps for rollout in rollouts])
        names = {name: index for index, name in enumerate(dict.fromkeys((r.prompt.id, r.visit) for r in rollouts))}
        group_R = torch.tensor([names[r.prompt.id, r.visit] for r in rollouts])
        rollout_N = torch.repeat_interleave(torch.arange(len(rollouts)), steps_R)
        reward_R = _rewards(rollouts)
        engine = [
            torch.full((r.steps,), float("nan")) if r.engine_logp_A is None else r.engine_logp_A for r in rollouts
        ]
        turns = [torch.zeros(r.steps, dtype=torch.long) if r.turn_A is None else r.turn_A for r in rollouts]
        steps = Steps(
            tokens_N=torch.cat([r.sequence.actions_A for r in rollouts]),
            rollout_N=rollout_N,
            position_N=torch.cat([torch.arange(int(steps)) for steps in steps_R]),
            turn_N=torch.cat(turns),
            group_N=group_R[rollout_N],
            reward_N=None if bool(reward_R.isnan().any()) else reward_R[rollout_N],
            engine_logp_N=torch.cat(engine).float(),
        )
        return Pack(tuple(rollouts), steps, group_R)


def _rewards(rollouts: Sequence[Rollout]) -> Tensor:
    given = [float("nan") if rollout.reward is None else rollout.reward for rollout in rollouts]
    return torch.tensor(given, dtype=torch.float64)
