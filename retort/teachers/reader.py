"""How a teacher reads rollouts: its own rendering of each view's prompt, then the student's very tokens.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from retort.align.chat import Renderer, TemplateOptions, rendered
from retort.align.images import ImageTokens
from retort.align.pair import Alignment
from retort.core.rollouts import Group, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.teachers.base import Read
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

#: One thread at a time renders: views are the user's code, and a tokenizer may not be read by two threads.
_RENDERS = threading.RLock()


@dataclass(frozen=True)
class Prompts:
    """The prompts that a teacher reads before the rollouts of a pack.

    Attributes:
        contexts: What is read before each sequence (`Pack.sequences`); None where there is no context.
        first: Those of the first sequence of each rollout.
        cut: Number of rollouts with a privileged text cut to fit, or to nothing.
        shows: Number of rollouts that a template was shown for, by its name.
    """

    contexts: Sequence[TokenSequence | None]
    first: Sequence[TokenSequence | None]
    cut: int = 0
    shows: Mapping[str, int] = field(default_factory=lambda: {})

    def valid_N(self, pack: Pack) -> Tensor | None:
        """See `TeacherSignal.valid_N`."""
        valid_S = torch.tensor([own is not None for own in self.contexts])
        return None if bool(valid_S.all()) else valid_S.repeat_interleave(pack.steps_S)

    @property
    def counts(self) -> dict[str, float]:
        """See `TeacherSignal.counts`."""
        read = [len(own) for own in self.first if own is not None]
        shows = {f"shows/{name}": float(count) for name, count in self.shows.items()}
        return {"no_context": len(self.first) - len(read), "cut": self.cut, "prompt_tokens": sum(read), **shows}


class RenderingModel(Protocol):
    """What is known of a model that reads, wherever it computes."""

    @property
    def name(self) -> str:
        """Its path, hub name or address, for messages."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence that it takes, tokens."""
        ...

    @property
    def image_tokens(self) -> ImageTokens | None:
        """How images are written into its prompts; None for a model of text alone."""
        ...

    def check_media(self, sequences: Iterable[TokenSequence], where: str) -> None:
        """Raises `UserError` if one of these holds media that it cannot read."""
        ...

    def check_ids(self, ids: Iterable[int], where: str = "a text") -> None:
        """Raises `UserError` if the model has no row for one of these ids."""
        ...


class Reader:
    """A model beside a student: what it reads before and in the student's rollouts, in its own ids."""

    def __init__(
        self,
        lm: RenderingModel,
        *,
        alignment: Alignment,
        batch_tokens: int,
        template_options: TemplateOptions | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Builds the reader.

        Args:
            lm: The model.
            alignment: The alignment with the student's ids.
            batch_tokens: Tokens per forward pass.
            template_options: Options of chat templates.
            stage: Data that views may read besides a rollout and its siblings.
        """
        self.lm: Any = lm
        self.alignment = alignment
        self.batch_tokens = batch_tokens
        self.template_options = template_options or TemplateOptions()
        self.stage = stage or Stage()
        self.name = lm.name
        self.render = Renderer(lm.tokenizer, self.template_options, lm.image_tokens)

    def for_vocab(self, vocab: int) -> Self:
        """The same for fewer ids of the student's."""
        return self._changed(alignment=self.alignment.for_vocab(vocab))

    def on(self, stage: Stage) -> Self:
        """The same with other data for its views."""
        return self._changed(stage=stage)

    def _changed(self, **changed: Any) -> Self:
        names = ("alignment", "batch_tokens", "template_options", "stage")
        return type(self)(self.lm, **{name: getattr(self, name) for name in names} | changed)

    def prompts(self, pack: Pack, view: View) -> Prompts:
        """The prompts before the rollouts of a pack, as long as the stage and the model's context allow.

        A view's prompt takes the first prompt's place before every sequence of a rollout, and the messages that follow
        the first prompt there follow the view's. A view by step has a prompt for each sequence.
        """
        found, first = list[TokenSequence | None](), list[TokenSequence | None]()
        cut, shows = 0, dict[str, int]()
        for rollout, group in zip(pack.rollouts, pack.groups(), strict=True):
            parts = rollout.apart() if view.by_step else [rollout]
            with _RENDERS:
                read = [self._prompts_of(part, group, view) for part in parts]
            own = [context for part in read for context in part.contexts]
            cut += any(part.cut for part in read)
            for name in {name for part in read for name in part.shows}:
                shows[name] = shows.get(name, 0) + 1
            found += own
            first.append(own[0])
        return Prompts(found, first, cut, shows)

    def shown(self, view: View, prompt: Prompt, visit: int, room: int) -> TokenSequence | None:
        """A view's prompt before anything is written; None where there is no context, or no room for it.

        Args:
            view: The view; of one that shows rollouts there is nothing to show.
            prompt: The prompt.
            visit: The visit to it.
            room: Tokens that a completion may have.
        """
        sequence = self.render(prompt).then([0] * room, decided=True)
        rollout = Rollout(prompt, (sequence,), visit=visit)
        return self._prompts_of(rollout, (rollout,), view).first[0]

    def _prompts_of(self, rollout: Rollout, group: Group, view: View) -> Prompts:
        """The prompts before the sequences of one rollout."""
        view_input = ViewInput(rollout, group, self.stage, shown=set())
        prompt, cut = view.prompt(view_input), 0
        split = view.render is not None
        found = None if prompt is None else self._before(rollout, prompt, split=split)
        if found is not None and split and not self._fits(rollout, found):
            prompt = view_input.shortened(
                view.prompt, lambda made: self._fits(rollout, self._before(rollout, made, split=True))
            )
            found = None if prompt is None else self._before(rollout, prompt, split=True)
            cut = 1
        own: list[TokenSequence | None] = [None] * len(rollout.sequences) if found is None else [*found]
        return Prompts(own, own[:1], cut, dict.fromkeys((view_input.shown or ()) if found is not None else (), 1))

    def _before(self, rollout: Rollout, prompt: Prompt, *, split: bool) -> list[TokenSequence]:
        """What is read before each sequence of a rollout that began with this prompt."""
        first, *later = rollout.prompts(prompt)
        # A view, and a conversation, show texts that models generated: tokens that they spell must not end a run.
        # What was said comes once, so there is no use in caching it.
        options, images = self.template_options, self.lm.image_tokens
        own = (rendered(prompt, self.lm.tokenizer, options, images, split=True) for prompt in later)
        return [self.render(first, split=split), *own]

    def _fits(self, rollout: Rollout, contexts: Sequence[TokenSequence]) -> bool:
        """Whether the first prompt is short enough for the stage, and each with its sequence for the model."""
        sequences = zip(contexts, rollout.sequences, strict=True)
        whole = all(len(own) + len(sequence.continuation) <= self.lm.context for own, sequence in sequences)
        return whole and len(contexts[0]) <= (self.stage.longest or 2**31)

    def sequences(self, pack: Pack, prompts: Prompts) -> list[TokenSequence]:
        """The sequences that the teacher scores, in its own ids, of those rollouts for which there is a context."""
        for rollout in pack.rollouts:
            self.lm.check_media(rollout.sequences, f"the rollout of prompt '{rollout.prompt.id}'")
        found = zip(pack.sequences, prompts.contexts, strict=True)
        return [self._sequence(sequence, context) for sequence, context in found if context is not None]

    def read(self, groups: Sequence[Group], view: View) -> Read:
        """See `CacheableTeacher`."""
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, view)
        read = [
            None if context is None else self._sequence(sequence, context)
            for sequence, context in zip(pack.sequences, prompts.contexts, strict=True)
        ]
        ends = list(accumulate((len(rollout.sequences) for rollout in pack.rollouts), initial=0))
        parts = [read[start:end] for start, end in pairwise(ends)]
        sequences = [None if None in own else tuple(one for one in own if one is not None) for own in parts]
        return Read(sequences, self.alignment.digest, prompts.counts)

    def _sequence(self, sequence: TokenSequence, context: TokenSequence) -> TokenSequence:
        """The sequence that the teacher scores: its own rendering of the prompt, then the student's very tokens.

        Replies of an environment within a sequence are as the student read them; stops that the student decided are
        mapped. All ids are the teacher's.
        """
        # The student's prompt may hold ids without a row in this model; the teacher renders its own, from text alone.
        return self.alignment.read(sequence).with_prefix(context)
