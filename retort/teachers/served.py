"""A teacher that a server holds. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from retort.align.pair import SameIds
from retort.core.head import Head
from retort.core.rollouts import Group, Pack
from retort.core.signals import Sampled, TeacherSignal
from retort.models.served import ServedModel
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher, kept_ids, signal_from


class ServedTeacher(LocalTeacher):
    """A frozen model that a server holds, whose prompts are rendered here.

    A whole distribution comes as hidden states, which the head that was sent once turns into logits here. Where a few
    numbers a token are enough, the server reduces them, if teacher and student have the same ids and stops.
    """

    def score(
        self, groups: Sequence[Group], request: ScoreRequest, *, head: Callable[[], Head] | None = None
    ) -> TeacherSignal:
        """See `Teacher`.

        Raises:
            SignalError: Its numbers are not finite, or about something else.
            UnreachableError: The server gave no usable answer within the patience of its client.
        """
        if request.whole or request.ahead or not isinstance(self.alignment, SameIds) or self.alignment.stops:
            return super().score(groups, request, head=head)
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, request.view)
        if prompts.valid_N(pack) is not None:
            return super().score(groups, request, head=head)
        sequences = [
            self._sequence(sequence, context)
            for sequence, context in zip(pack.sequences, prompts.contexts, strict=True)
            if context is not None
        ]
        vocab, top_k = self.alignment.vocab, kept_ids(request.needs)
        settings = {
            "vocab": vocab,
            "temperature": request.temperature,
            "entropy": any(need.kind == "entropy" for need in request.needs),
            "top_k": top_k,
        }
        lm, ids_NK = cast("ServedModel", self.lm), request.student_ids_NK
        found = lm.score(sequences, self.batch_tokens, settings, ids_NK)
        about = Sampled(
            pack.steps.tokens_N.to(lm.device), self.name, found["sampled"].to(lm.device), counts=prompts.counts
        )
        return signal_from(found, about, ids_NK, whole=top_k >= vocab)
