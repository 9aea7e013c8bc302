"""Prompts, and the rollouts that were generated for them. Axis letters: see `retort.core`.

`Rollout.cut` shortens a rollout. `Source._cut` (`retort.train.source.source`) calls it for rollouts of the teacher and
of the replay buffer; new ones end at the limit while they are generated.
Nothing here is mutated after construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.messages import Message, joined
from retort.core.passages import Passage, confidence_NK
from retort.core.sequences import TokenSequence
from retort.core.steps import Steps


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
        teacher_images: Images that only a teacher may see, such as the prompt's own with a box drawn in.
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
    teacher_images: tuple[PromptImage, ...] = ()

    @property
    def images(self) -> tuple[PromptImage, ...]:
        """All images of its messages, in order."""
        return tuple(image for message in self.messages for image in message.images)

    def shown(self, column: str) -> str | None:
        """The text of a column that a view may show; `demonstration` falls back to the given response."""
        if column == "clean":
            return None if self.clean is None else "\n".join(message.readable for message in self.clean)
        given = {"answer": self.answer, "response": self.response, **self.privileged}
        return given.get(column) or (self.response if column == "demonstration" else None)

    @property
    def text(self) -> str:
        """The bare text: all contents, one after another."""
        return "\n".join(message.content for message in self.messages)

    @property
    def readable(self) -> str:
        """Its text for people and graders: words stand where an image does."""
        return "\n".join(message.readable for message in self.messages)

    def then(self, messages: Sequence[Message]) -> Prompt:
        """The conversation, followed by messages.

        Of two neighbours of the user, the second continues the first after an empty line: many chat templates refuse
        two in a row.
        """
        *before, last = self.messages
        first = next(iter(messages), None)
        if first is not None and last.role == first.role == "user" and not (last.extra or first.extra):
            return replace(self, messages=(*before, joined(last, first), *messages[1:]))
        return replace(self, messages=(*self.messages, *messages))


#: The least reward of a right completion, wherever right ones and wrong ones are told apart; from 0 to 1.
RIGHT_FROM = 0.5


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

    Its decisions are those of its sequences, one sequence after another. A completion, and an episode that is one
    growing conversation, are one sequence; an episode whose conversation is rendered anew on the way has several. No
    statistic sees the difference: turns, log-probs, reward and member are of the whole rollout.

    Attributes:
        prompt: The prompt that it completes.
        sequences: All tokens in order, and the action mask: which of them the policy decided. A single sequence may be
            given by itself. Of several, each holds a decision.
        turn_A: Index of the turn of each decided token, int64; None for a single turn.
        engine_logp_A: Log-prob that the rollout engine reported for each decided token, nats; None for data.
        policy_version: Optimizer steps that the student had taken when it generated this, or the first token of it.
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
        histories: The messages behind the prompt with which each sequence but the first begins.
        passages: Texts that models wrote before a teacher scores it, for views that show them.
        segments: Of a completion that may have been generated in several batches, each segment's version of the
            weights and number of tokens, in order; empty where `policy_version` generated all of it.

    Raises:
        ValueError: Sequences, turns, log-probs, segments and histories are not of one number; or a log-prob is NaN.
    """

    prompt: Prompt
    sequences: tuple[TokenSequence, ...]
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
    histories: tuple[tuple[Message, ...], ...] = ()
    passages: tuple[Passage, ...] = ()
    segments: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.sequences, TokenSequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            object.__setattr__(self, "sequences", (self.sequences,))
        if len(self.histories) != len(self.sequences) - 1:
            raise ValueError(
                f"{len(self.histories)} histories for {len(self.sequences)} sequences; all but one have one"
            )
        if len(self.sequences) > 1 and not all(sequence.steps for sequence in self.sequences):
            raise ValueError("a rollout of several sequences has one in which nothing is decided; leave it out")
        if self.turn_A is not None and len(self.turn_A) != self.steps:
            raise ValueError(f"{len(self.turn_A)} turns for {self.steps} decided tokens")
        if self.engine_logp_A is not None and len(self.engine_logp_A) != self.steps:
            raise ValueError(f"{len(self.engine_logp_A)} engine log-probs for {self.steps} decided tokens")
        if self.segments and sum(tokens for _, tokens in self.segments) != self.steps:
            raise ValueError(f"segments {self.segments} for {self.steps} decided tokens")
        if self.engine_logp_A is not None and bool(self.engine_logp_A.isnan().any()):
            raise ValueError("an engine's log-prob is NaN; leave out those of a rollout that has none")

    @property
    def sequence(self) -> TokenSequence:
        """The only sequence.

        Raises:
            ValueError: There are several.
        """
        if len(self.sequences) != 1:
            raise ValueError(f"a rollout of '{self.prompt.id}' has {len(self.sequences)} sequences; read `sequences`")
        return self.sequences[0]

    @property
    def steps(self) -> int:
        """Number of decision steps (decided tokens)."""
        return sum(sequence.steps for sequence in self.sequences)

    @property
    def tokens_by_version(self) -> tuple[tuple[int, int], ...]:
        """Versions of the weights that generated it, in order, each with its number of decided tokens."""
        return self.segments or ((self.policy_version, self.steps),)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences, those that are read included."""
        return sum(map(len, self.sequences))

    @property
    def splits(self) -> int:
        """How often its conversation was rendered anew."""
        return len(self.sequences) - 1

    @property
    def prefix_ids(self) -> list[int]:
        """Ids of the tokens before its first decision."""
        return self.sequences[0].prefix.tokens_L.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    @property
    def actions_A(self) -> Tensor:
        """Ids of the decided tokens, [A], int64."""
        return torch.cat([sequence.actions_A for sequence in self.sequences])

    @property
    def action_ids(self) -> list[int]:
        """Ids of the decided tokens, [A]."""
        return self.actions_A.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def prompts(self, first: Prompt) -> list[Prompt]:
        """The conversation before each sequence, if it began with this prompt (its own, or that of a view)."""
        return [first, *(first.then(history) for history in self.histories)]

    def apart(self) -> list[Rollout]:
        """Its sequences as rollouts of their own, each to the conversation before it; their text is not known."""
        if len(self.sequences) == 1 and all(own.sequence is None for own in self.passages):
            return [self]
        bare = replace(self, sequences=self.sequences[:1], histories=(), turn_A=None, engine_logp_A=None, text="")
        return [
            replace(
                bare,
                prompt=prompt,
                sequences=(sequence,),
                passages=tuple(own for own in self.passages if own.sequence in (None, place)),
            )
            for place, (prompt, sequence) in enumerate(zip(self.prompts(self.prompt), self.sequences, strict=True))
        ]

    def cut(self, steps: int, text: str) -> Rollout:
        """The rollout up to the first `steps` decisions, as truncated; itself where it has no more.

        Args:
            steps: Number of decisions that stay.
            text: Text of the decisions that stay.
        """
        if self.steps <= steps:
            return self
        kept, left = list[TokenSequence](), steps
        for sequence in self.sequences:
            if left > 0 or not kept:
                kept.append(sequence.cut(left))
            left -= sequence.steps
        return replace(
            self,
            sequences=tuple(kept),
            histories=self.histories[: len(kept) - 1],
            turn_A=None if self.turn_A is None else self.turn_A[:steps],
            engine_logp_A=None if self.engine_logp_A is None else self.engine_logp_A[:steps],
            status=Status.TRUNCATED,
            text=text,
            segments=_first(self.segments, steps),
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

    @cached_property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The sequences of all rollouts, in order; one for each rollout, but where a conversation was rendered anew."""
        return tuple(sequence for rollout in self.rollouts for sequence in rollout.sequences)

    @property
    def steps_S(self) -> Tensor:
        """Number of steps of each of `sequences`, [S], int64."""
        return torch.tensor([sequence.steps for sequence in self.sequences])

    def sequences_of(self, rollouts: Sequence[int]) -> list[int]:
        """Places in `sequences` of those of some rollouts, in the order given."""
        ends = list(accumulate((len(rollout.sequences) for rollout in self.rollouts), initial=0))
        return [place for rollout in rollouts for place in range(ends[rollout], ends[rollout + 1])]

    def steps_of(self, rollouts: Sequence[int]) -> Tensor:
        """Indices in N of the steps of some rollouts, in the order given."""
        return _places(torch.bincount(self.steps.rollout_N, minlength=len(self.rollouts)), rollouts)

    def steps_in(self, sequences: Sequence[int]) -> Tensor:
        """Indices in N of the steps of some of `sequences`, in the order given."""
        return _places(self.steps_S, sequences)

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
            tokens_N=torch.cat([r.actions_A for r in rollouts]),
            rollout_N=rollout_N,
            position_N=torch.cat([torch.arange(int(steps)) for steps in steps_R]),
            turn_N=torch.cat(turns),
            group_N=group_R[rollout_N],
            reward_N=None if bool(reward_R.isnan().any()) else reward_R[rollout_N],
            engine_logp_N=torch.cat(engine).float(),
            confidence_NK=confidence_NK([(r.passages, [own.steps for own in r.sequences]) for r in rollouts]),
        )
        return Pack(tuple(rollouts), steps, group_R)


def _first(segments: Sequence[tuple[int, int]], steps: int) -> tuple[tuple[int, int], ...]:
    """The segments up to so many decisions."""
    begins = accumulate((tokens for _, tokens in segments), initial=0)
    kept = [(version, min(tokens, steps - begin)) for (version, tokens), begin in zip(segments, begins, strict=False)]
    return tuple(own for own in kept if own[1] > 0)


def _places(steps_X: Tensor, chosen: Sequence[int]) -> Tensor:
    """Indices in N of the steps of some of X neighbours, each of which has so many steps."""
    chosen_X = torch.tensor(chosen, dtype=torch.long)
    starts_X = steps_X.cumsum(0) - steps_X
    steps, starts = steps_X[chosen_X], starts_X[chosen_X]
    # A step's index is its neighbour's start in N, plus its offset from that start among the chosen steps.
    behind = torch.arange(int(steps.sum())) - torch.repeat_interleave(steps.cumsum(0) - steps, steps)
    return torch.repeat_interleave(starts, steps) + behind


def _rewards(rollouts: Sequence[Rollout]) -> Tensor:
    given = [float("nan") if rollout.reward is None else rollout.reward for rollout in rollouts]
    return torch.tensor(given, dtype=torch.float64)
