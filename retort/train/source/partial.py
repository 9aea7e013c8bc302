"""Completions that do not end within a budget of tokens a batch: waited for, dropped, or resumed in the next batch.

With a budget, a batch does not take as long as its longest completion ("partial rollouts" of Kimi k1.5, arXiv
2501.12599). It counts tokens and no time, so what is generated depends on no clock. Axis letters: see `retort.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from retort.align.text import completion_text
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Group, Prompt, Rollout, Status, in_groups
from retort.rollout.engines.base import Completion, Engine, Request, Sampling
from retort.rollout.episodes import Task
from retort.train.source.ages import token_ages
from retort.train.source.order import Visit, visits, visits_from
from retort.train.source.unended import Unended
from retort.train.source.waiting_batches import WaitingBatch, stored, unstored

_PREFIX = "partial/"
_POSITION = _PREFIX + "position"


@dataclass(frozen=True)
class Generation:
    """How a source generates and grades the student's completions of a batch.

    Attributes:
        engine: Generates as the student, with the weights of this batch.
        seed: The seed of the run.
        sampling: Settings of sampling; `max_new_tokens` is for whole completions.
        divide: Has every rank work on its part of some tasks or rollouts; the results of all, in order.
        whole: Generates some tasks to their ends, and grades them.
        play: Generates some tasks with other settings of sampling.
        grade: Grades some rollouts.
    """

    engine: Engine
    seed: int
    sampling: Sampling
    divide: Callable[[Sequence[Any], Callable[[Sequence[Any]], list[Rollout]]], list[Rollout]]
    whole: Callable[[Sequence[Task]], list[Rollout]]
    play: Callable[[Sequence[Task], Sampling], list[Rollout]]
    grade: Callable[[list[Rollout]], list[Rollout]]


class Partial(Protocol):
    """What becomes of completions that do not end within a budget of tokens."""

    @property
    def words(self) -> str:
        """What becomes of them, for the start-up summary; empty without a budget."""
        ...

    @property
    def unended(self) -> Unended:
        """What became of them in the last batch."""
        ...

    def visits(self, prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
        """The prompts that begin in a batch, of which there are `count` if nothing is open."""
        ...

    def generate(self, tasks: Sequence[Task], by: Generation) -> list[Rollout]:
        """The student's graded completions of a batch in which these tasks begin.

        Raises:
            UserError: As `Engine.generate`, or the grader does not fit.
        """
        ...

    def ages(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """How old the tokens of a batch are for a student of this version, where they need not be its own."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the present state."""
        ...

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """State for a checkpoint; `prompts` are the training ones."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> None:
        """Restores `tensors`, and ignores those of other parts."""
        ...


@dataclass(eq=False)
class Waited:
    """Every completion is generated to its end: there is no budget.

    Attributes: see `Partial`.
    """

    words: str = ""
    unended: Unended = field(default_factory=Unended)

    def visits(self, prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
        """See `Partial`."""
        return visits(prompts, seed=seed, step=step, count=count)

    def generate(self, tasks: Sequence[Task], by: Generation) -> list[Rollout]:
        """See `Partial`; a rank grades what it generates."""
        return by.divide(tasks, by.whole)

    def ages(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """See `Partial`."""
        return {}

    def mark(self) -> Callable[[], None]:
        """See `Partial`."""
        before = self.unended

        def put_back() -> None:
            self.unended = before

        return put_back

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """See `Partial`."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> None:
        """See `Partial`."""


@dataclass(eq=False)
class Dropped(Waited):
    """Completions that have not ended after so many tokens are left out, which favours short ones.

    Attributes:
        tokens: The budget.
    """

    tokens: int = 1

    def __post_init__(self) -> None:
        self.words = f"a completion that has not ended after {self.tokens:,} tokens is dropped"

    def generate(self, tasks: Sequence[Task], by: Generation) -> list[Rollout]:
        """See `Partial`; none at all where every one was dropped."""
        longest = by.sampling.max_new_tokens
        sampling = replace(by.sampling, max_new_tokens=min(self.tokens, longest))
        found = by.divide(tasks, lambda own: by.play(own, sampling))
        dropped = [own for own in found if self.tokens < longest and own.status == Status.TRUNCATED]
        self.unended = Unended.without(dropped, self.tokens)
        kept = [own for own in found if self.tokens >= longest or own.status != Status.TRUNCATED]
        return by.divide(kept, lambda own: by.grade(list(own)))


@dataclass(eq=False)
class Resumed:
    """Completions that have not ended go on in the next batch, with the weights of that batch.

    A group is given when its last member has ended. A batch begins as many prompts as there is room for beside the
    open groups. If no group ends in it, all go on for another segment until one does. Random numbers are keyed by
    prompt, member and position, so a completion that goes on with the same weights is the one that was never
    interrupted.

    Attributes:
        tokens: The budget.
        unended: See `Partial`.
    """

    tokens: int
    unended: Unended = field(default_factory=Unended)
    _open: Sequence[Group] = ()
    _begun: int = 0

    @property
    def words(self) -> str:
        """See `Partial`."""
        return f"a completion that has not ended after {self.tokens:,} tokens of a batch goes on in the next one"

    def visits(self, prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
        """See `Partial`; they follow those that began in earlier batches, however many these were."""
        found = visits_from(prompts, seed=seed, start=self._begun, count=count - len(self._open))
        self._begun += len(found)
        return found

    def generate(self, tasks: Sequence[Task], by: Generation) -> list[Rollout]:
        """See `Partial`; only those whose group has ended."""
        longest, ended = by.sampling.max_new_tokens, list[Group]()
        going = [*self._open, *in_groups([_empty(task) for task in tasks])]
        while going and not ended:
            going = self._further(going, by)
            ended = [group for group in going if all(_over(own, longest) for own in group)]
        self._open = tuple(group for group in going if not all(_over(own, longest) for own in group))
        beside = [_over(own, longest) for group in self._open for own in group]
        self.unended = Unended(going_on=beside.count(False), awaiting_group=beside.count(True))
        whole = [_with_text(own, by.engine) for group in ended for own in group]
        return by.divide(whole, lambda own: by.grade(list(own)))

    def ages(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """See `Partial`."""
        return token_ages(groups, version)

    def mark(self) -> Callable[[], None]:
        """See `Partial`."""
        before = self._open, self._begun, self.unended

        def put_back() -> None:
            self._open, self._begun, self.unended = before

        return put_back

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """See `Partial`: the open groups, and how many prompts have begun."""
        held = stored([WaitingBatch(0, 0, list(self._open))] if self._open else [], prompts, prefix=_PREFIX)
        return {**held, _POSITION: torch.tensor(self._begun)}

    def restore(self, tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> None:
        """See `Partial`."""
        held = unstored(tensors, prompts, prefix=_PREFIX)
        self._open = tuple(group for batch in held for group in batch.groups)
        self._begun = int(tensors[_POSITION])

    def _further(self, going: Sequence[Group], by: Generation) -> list[Group]:
        """The groups after another segment of each of their completions that has not ended."""
        longest = by.sampling.max_new_tokens
        due = [own for group in going for own in group if not _over(own, longest)]
        found: Iterator[Rollout] = iter(by.divide(due, lambda own: self._segment(own, by)))
        return [tuple(own if _over(own, longest) else next(found) for own in group) for group in going]

    def _segment(self, rollouts: Sequence[Rollout], by: Generation) -> list[Rollout]:
        """Some completions, each with at most so many more tokens."""
        sampling = replace(by.sampling, max_new_tokens=self.tokens)
        requests = [Request(own.sequence, self._uniforms(own, by)) for own in rollouts]
        found = by.engine.generate(requests, sampling)
        return [_longer(own, more) for own, more in zip(rollouts, found, strict=True)]

    def _uniforms(self, own: Rollout, by: Generation) -> Tensor:
        """The random numbers of a completion's next tokens: those that it would have had uninterrupted."""
        stream = UniformStream(by.seed, "rollouts", own.visit, own.prompt.id, own.member)
        end = min(own.steps + self.tokens, by.sampling.max_new_tokens)
        return stream.uniforms(0, count=end)[own.steps :]


def _empty(task: Task) -> Rollout:
    """A completion without a token."""
    return Rollout(
        prompt=task.prompt,
        sequences=(task.context,),
        engine_logp_A=torch.zeros(0),
        member=task.member,
        visit=task.visit,
        status=Status.TRUNCATED,
    )


def _over(own: Rollout, longest: int) -> bool:
    return own.status == Status.COMPLETED or own.steps >= longest


def _longer(own: Rollout, more: Completion) -> Rollout:
    assert own.engine_logp_A is not None  # `_empty` has made it
    return replace(
        own,
        sequences=(own.sequence.then(more.ids, decided=True),),
        engine_logp_A=torch.cat([own.engine_logp_A, more.logp_A]),
        policy_version=own.policy_version if own.segments else more.version,
        status=more.status,
        segments=(*own.segments, (more.version, len(more.ids))),
    )


def _with_text(own: Rollout, engine: Engine) -> Rollout:
    return replace(own, text=completion_text(engine.tokenizer, own.action_ids, prompt_ids=own.prefix_ids))
