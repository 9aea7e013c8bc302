"""A teacher in this process with another tokenizer than the student. Axis letters: see `retort.core`; M its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.align.aligned import AlignedTurns, Coverage
from retort.align.pieces import shown_pieces
from retort.align.replies import reply_ids
from retort.align.spanned import SpanPair
from retort.core.head import Head
from retort.core.needs import NeedKind
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, Pack, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import LONGEST_UNIT, SPAN_KINDS, Dense, Spans, TeacherSignal, TeacherTokens, columns_of
from retort.errors import SignalError, UserError
from retort.teachers.base import Read, ScoreRequest
from retort.teachers.local import LocalTeacher, Prompts
from retort.teachers.view import View


class SpanTeacher(LocalTeacher):
    """A frozen model with a tokenizer of its own: it reads the bytes that the student generated in its own tokens.

    It gives one number for each unit of tokens that spell the same bytes on both sides, and its distribution where a
    unit begins. Its prompts, and what an environment replied between turns, are rendered by its own chat template.
    """

    capabilities: frozenset[NeedKind] = SPAN_KINDS

    def __init__(self, lm: Any, *, alignment: SpanPair, **others: Any) -> None:
        """Builds the teacher; see `LocalTeacher`."""
        super().__init__(lm, alignment=alignment, **others)  # type: ignore[arg-type]
        self.pair = alignment

    def in_own_ids(self) -> LocalTeacher:
        """The same model for completions in its own ids with its own stop token, such as its own."""
        return LocalTeacher(
            self.lm,
            alignment=self.pair.itself(),
            batch_tokens=self.batch_tokens,
            template_options=self.template_options,
            stage=self.stage,
        )

    def spelt(self, sequence: TokenSequence) -> list[str]:
        r"""The texts of the teacher's tokens in the units of a student's sequence, in order.

        A part of a character is shown by its bytes (`\xf0`), a control token by its name. The teacher's context is
        taken to hold all of it.
        """
        own = self.pair.units(sequence)
        kept_U = (own.student_U <= LONGEST_UNIT) & (own.teacher_U <= LONGEST_UNIT)
        kept_B = (own.unit_B >= 0) & kept_U[own.unit_B.clamp_min(0)] if len(kept_U) else own.unit_B >= 0
        ids: list[int] = own.sequence.actions_A[kept_B].tolist()
        return shown_pieces(self.lm.tokenizer, ids)

    def replies(self, rollout: Rollout) -> list[list[list[int]]]:
        """For each sequence of a rollout, the teacher's ids of every reply in it, from the end of the turn before on.

        Raises:
            SignalError: The rollout does not hold the messages of a reply.
            UserError: The teacher's chat template cannot go on with one, see `reply_ids`.
        """
        found, turn = list[list[list[int]]](), 0
        for sequence in rollout.sequences:
            ends = self.pair.turn_ends(sequence)
            said = [outcome.messages for outcome in rollout.outcomes[turn : turn + len(ends)]]
            turn += len(ends) + 1
            if len(said) < len(ends) or not all(said):
                raise SignalError(
                    f"prompt '{rollout.prompt.id}': {self.name} has another tokenizer, and a rollout has {len(ends)} "
                    "replies of an environment without their messages, which the teacher would read in its own tokens"
                )
            try:
                found.append(
                    [
                        reply_ids(rollout.prompt, messages, end, self.lm.tokenizer, self.template_options)
                        for messages, end in zip(said, ends, strict=True)
                    ]
                )
            except UserError as error:
                raise UserError(f"{self.name}, which has another tokenizer than the student: {error}") from None
        return found

    def score(
        self, groups: Sequence[Group], request: ScoreRequest, *, head: Callable[[], Head] | None = None
    ) -> TeacherSignal:
        """See `Teacher`. The signal keeps hidden states where units begin, and sums of log-probs.

        Raises:
            SignalError: The teacher cannot read a rollout at all; `docs/tokenizers.md` says what is counted instead.
            UserError: Its chat template cannot go on with a reply of the environment.
        """
        pack, temperature = Pack.of([rollout for group in groups for rollout in group]), request.temperature
        prompts = self.prompts(pack, request.view)
        turns = self._turns(pack, prompts)
        read = [own for own in turns if own is not None and own.sequence.steps]
        with self.lm.scoring():
            hidden_MD = self.hidden_states([own.sequence for own in read])
            unchanged = head or self._unchanged_head()
        tokens_M = _joined([own.sequence.actions_A for own in read]).to(hidden_MD.device)

        def logits(index_M: Tensor | slice) -> Tensor:
            with torch.no_grad(), self.lm.compute():
                return unchanged().logits(hidden_MD[index_M], self.pair.width)

        logp_M, raw_M = _sampled(Dense(tokens_M, self.name, logits, self.pair.width, temperature))
        shared = self.pair.shared.student_K.to(tokens_M.device), self.pair.shared.teacher_K.to(tokens_M.device)
        tokens_N = pack.steps.tokens_N.to(tokens_M.device)
        unit_N, unit_M = (unit.to(tokens_M.device) for unit in _numbered(turns, pack))
        columns, begins_N = columns_of(
            unit_N, unit_M, tokens_N, tokens_M, logp_M, shared, raw_M=raw_M, longest=LONGEST_UNIT
        )
        valid_N = prompts.valid_N(pack)
        return Spans(
            tokens_N,
            self.name,
            lambda index_C: logits(begins_N[index_C]),
            self.pair.width,
            temperature,
            **columns,  # type: ignore[arg-type]
            shared=shared,
            stops=(self.pair.student_stops.to(tokens_M.device), self.pair.teacher_stops.to(tokens_M.device)),
            their_first_N=begins_N,
            theirs=TeacherTokens(tokens_M, logp_M, logits, self.pair.width, temperature, lambda: self.pair.prefixes),
            valid_N=None if valid_N is None else valid_N.to(tokens_M.device),
            counts=prompts.counts | coverage_counts(turns),
        )

    def read(self, groups: Sequence[Group], view: View) -> Read:
        """See `CacheableTeacher`. Its own tokens of a sequence are decided where they are of the student's bytes."""
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, view)
        turns = iter(self._turns(pack, prompts))
        parts = [[next(turns) for _ in rollout.sequences] for rollout in pack.rollouts]
        sequences = [None if None in own else tuple(one.sequence for one in own if one is not None) for own in parts]
        return Read(sequences, "units of bytes", prompts.counts)

    def _turns(self, pack: Pack, prompts: Prompts) -> list[AlignedTurns | None]:
        """Each sequence as the teacher reads it; None where there is no context."""
        asked = zip(pack.rollouts, prompts.first, strict=True)
        said = [
            replies
            for rollout, context in asked
            for replies in ([[]] * len(rollout.sequences) if context is None else self.replies(rollout))
        ]
        return [
            None if context is None else self.pair.read(sequence, context.ids, replies)
            for sequence, context, replies in zip(pack.sequences, prompts.contexts, said, strict=True)
        ]


@torch.no_grad()
def _sampled(dense: Dense) -> tuple[Tensor, Tensor]:
    """Log-prob, and logit over the temperature, of the teacher's own tokens, [M] each."""
    found: list[tuple[Tensor, Tensor]] = []
    for rows in in_blocks(dense, dense.width):
        logp = rows.sampled_logp_N
        found.append((logp, logp + rows.distribution.normaliser_C))
    if not found:
        none = torch.zeros(0, device=dense.tokens_N.device)
        return none, none
    return torch.cat([logp for logp, _ in found]), torch.cat([raw for _, raw in found])


def _joined(ids: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(ids)) if ids else torch.zeros(0, dtype=torch.long)


def _numbered(turns: Sequence[AlignedTurns | None], pack: Pack) -> tuple[Tensor, Tensor]:
    """The unit of every step [N] and of every token of the teacher's [M], numbered through the pack; -1 for none."""
    steps: list[Tensor] = []
    tokens: list[Tensor] = []
    units = 0
    for own, sequence in zip(turns, pack.sequences, strict=True):
        if own is None:
            steps.append(torch.full((sequence.steps,), -1))
            continue
        steps.append(torch.where(own.unit_A >= 0, own.unit_A + units, -1))
        tokens.append(torch.where(own.unit_B >= 0, own.unit_B + units, -1))
        units += len(own.student_U)
    return _joined(steps), _joined(tokens)


def coverage_counts(turns: Sequence[AlignedTurns | None]) -> dict[str, float]:
    """Counts about a batch for the metrics: bytes in 1:1 units, in spans, and in none or in one that is too long."""
    total = sum((own.within(LONGEST_UNIT) for own in turns if own is not None), Coverage())
    return {
        "bytes_one_to_one": float(total.single),
        "bytes_spans": float(total.spans),
        "bytes_unread": float(sum(total.lost.values())),
    }
