"""Who writes the texts that views show: the engines of a run's models, asked before the teachers score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from retort.align.chat import Renderer
from retort.align.text import completion_text
from retort.core.passages import Passage
from retort.core.random_streams import uniforms
from retort.core.rollouts import Group, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.method import Method
from retort.ranks import World, here
from retort.rollout.engines.base import Engine, Request, Sampling
from retort.teachers.drafts import Draft, Turn, blind
from retort.teachers.moving import Weights
from retort.teachers.view_input import Stage, ViewInput


@dataclass(frozen=True, eq=False)
class Drafter:
    """A model that writes.

    Attributes:
        engine: Generates as the model.
        render: Gives a prompt's ids as the model reads it.
        within: Within it the model has these weights, and can generate without the other ranks; all enter it together.
    """

    engine: Engine
    render: Renderer
    within: Callable[[Weights], AbstractContextManager[None]] = lambda weights: nullcontext()


@dataclass(frozen=True, eq=False)
class _Unit:
    """What a text is written about.

    Attributes:
        rollout: As the author may know it.
        group: Its group, likewise.
        key: Tells it from all others of the run.
    """

    rollout: Rollout
    group: Group
    key: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Drafting:
    """The models of a run that write, by name.

    Attributes:
        drafters: By name of the model.
        stage: Inputs that all rollouts have in common.
        longest: Tokens of the longest text, where a `Draft` names no other number.
        world: The ranks, each of which writes for a part of the batch.
    """

    drafters: Mapping[str, Drafter]
    stage: Stage
    longest: int
    world: World = field(default_factory=here)

    def passages(self, method: Method, groups: Sequence[Group]) -> list[Group]:
        """The groups of a batch with all texts that the method's views show.

        Args:
            method: The method.
            groups: The whole batch, the same on all ranks.

        Raises:
            UnreachableError: A server with one of the models does not answer.
        """
        found = list(groups)
        for draft in dict.fromkeys(view.draft for view in method.views.values() if view.draft is not None):
            found = self._drafted(draft, found)
        return found

    def _drafted(self, draft: Draft, groups: Sequence[Group]) -> list[Group]:
        """Adds one kind of text; every rank writes for its own groups."""
        parts = [_units(draft, group) for group in groups]
        units = [unit for part in parts for unit in part]
        found: list[list[Passage]] = [[] for _ in units]
        for number in range(draft.rounds):
            before = [tuple(own) for own in found]
            for turn in draft.turns(number):
                author = draft.authors[turn.author]
                with self.drafters[author.model].within(author.weights):
                    said = self.world.divide(
                        list(zip(units, before, strict=True)),
                        lambda own, turn=turn: self._said(draft, turn, own),
                        key=lambda pair: pair[0].key[:2],
                    )
                for own, passage in zip(found, said, strict=True):
                    own += [passage] if passage is not None else []
        passages = iter(found)
        return [
            tuple(
                replace(rollout, passages=(*rollout.passages, *own))
                for rollout, own in zip(group, _by_rollout(draft, group, [next(passages) for _ in part]), strict=True)
            )
            for group, part in zip(groups, parts, strict=True)
        ]

    def _said(self, draft: Draft, turn: Turn, units: Sequence[tuple[_Unit, Sequence[Passage]]]) -> list[Passage | None]:
        """What one author writes about some units in its turn; None where it is not asked."""
        drafter = self.drafters[draft.authors[turn.author].model]
        longest = draft.max_new_tokens or self.longest
        found: list[Passage | None] = [None] * len(units)
        asked, requests = list[int](), list[Request]()
        for place, (unit, earlier) in enumerate(units):
            context = self._prompt(drafter, draft, turn, unit, earlier)
            if context is not None:
                key = (draft.name, *unit.key, turn.round, turn.author)
                room = min(longest, drafter.engine.context - len(context))
                asked.append(place)
                requests.append(Request(context, uniforms(self.stage.seed, "passages", *key, count=room)))
        if not requests:
            return found
        completions = drafter.engine.generate(requests, Sampling(longest, draft.temperature, draft.top_p))
        for place, request, own in zip(asked, requests, completions, strict=True):
            read = request.context.ids
            text = completion_text(drafter.engine.tokenizer, own.ids, prompt_ids=read)
            found[place] = draft.passage(turn, text, completed=own.status == Status.COMPLETED)
        return found

    def _prompt(
        self,
        drafter: Drafter,
        draft: Draft,
        turn: Turn,
        unit: _Unit,
        earlier: Sequence[Passage],
    ) -> TokenSequence | None:
        """What the author reads; None where it is not asked, or where there is no room for a word of its own."""
        view_input = ViewInput(unit.rollout, unit.group, self.stage)
        longest, context = draft.max_new_tokens or self.longest, drafter.engine.context

        def read(prompt: Prompt) -> TokenSequence:
            # It may show what models generated: tokens that these texts spell must stay text.
            return drafter.render(prompt, split=True)

        def fits(prompt: Prompt) -> bool:
            # Half of the context is for what it writes, unless it needs less.
            return len(read(prompt)) <= min(context - min(longest, context // 2), self.stage.longest or 2**31)

        prompt = draft.ask(view_input, earlier, turn)
        if prompt is not None and not fits(prompt):
            prompt = view_input.shortened(lambda cut: draft.ask(cut, earlier, turn), fits)
        return None if prompt is None else read(prompt)


def _units(draft: Draft, group: Group) -> list[_Unit]:
    """What is written about, of one group; authors that are blind get nothing that was generated."""
    first = group[0]
    if draft.per == "visit":
        own = blind(first)
        return [_Unit(own, (own,), (first.visit, first.prompt.id))]
    if draft.per == "rollout":
        return [_Unit(own, group, (own.visit, own.prompt.id, own.member)) for own in group]
    return [
        _Unit(own, (own,), (rollout.visit, rollout.prompt.id, rollout.member, "step", place))
        for rollout in group
        for place, part in enumerate(rollout.apart())
        for own in [blind(part)]
    ]


def _by_rollout(draft: Draft, group: Group, passages: Sequence[Sequence[Passage]]) -> tuple[tuple[Passage, ...], ...]:
    """What belongs to each rollout of a group."""
    if draft.per == "visit":
        return tuple(tuple(passages[0]) for _ in group)
    if draft.per == "rollout":
        return tuple(tuple(own) for own in passages)
    units, found = iter(passages), list[tuple[Passage, ...]]()
    for rollout in group:
        steps = len(rollout.sequences)
        found.append(tuple(replace(own, sequence=step) for step in range(steps) for own in next(units)))
    return tuple(found)
