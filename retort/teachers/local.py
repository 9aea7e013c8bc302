"""A teacher in this process. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from retort.core.head import Head
from retort.core.needs import Need, NeedKind
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, Pack
from retort.core.sequences import TokenSequence
from retort.core.signals import Ahead, Candidates, Dense, Factors, Sampled, TeacherSignal, TopK
from retort.errors import SignalError
from retort.models.branches import branch_states
from retort.models.lm import LanguageModel
from retort.teachers.base import ScoreRequest
from retort.teachers.lookahead import look_ahead, their_ids
from retort.teachers.reader import Prompts, Reader

#: Sequences -> hidden states at their decided tokens, end to end, [N, D].
States = Callable[[Sequence[TokenSequence]], Tensor]


class LocalTeacher(Reader):
    """A frozen model in this process; it meets any need but text."""

    capabilities: frozenset[NeedKind] = frozenset({"dense", "hidden", "lookahead"})
    lm: LanguageModel

    def __init__(self, lm: LanguageModel, *, states: States | None = None, **settings: Any) -> None:
        """Builds the teacher.

        Args:
            lm: The model.
            states: Gives the model's hidden states; None: they are computed.
            settings: See `Reader`.
        """
        super().__init__(lm, **settings)
        self.states = states

    def in_own_ids(self) -> LocalTeacher:
        """The same teacher for completions in its own ids with its own stop token, such as its own."""
        return self._changed(alignment=self.alignment.itself())

    def with_states(self, states: Callable[[States], States]) -> Self:
        """The same teacher with another way to its hidden states, which is given the one that computes them."""
        return self._changed(states=states(self.hidden_states))

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The model's last hidden states at the decided tokens of sequences, end to end, [N, D], without gradient."""
        return self.lm.all_hidden(sequences, self.batch_tokens) if self.states is None else self.states(sequences)

    def _changed(self, **changed: Any) -> Self:
        return super()._changed(**{"states": self.states, **changed})

    def score(
        self, groups: Sequence[Group], request: ScoreRequest, *, head: Callable[[], Head] | None = None
    ) -> TeacherSignal:
        """See `Teacher`. A whole signal (`ScoreRequest.whole`) keeps hidden states, [N, D]; all others are reduced.

        Args:
            groups: The rollouts.
            request: The request.
            head: Gives the current head, where its weights move; None: the model's, which must not change.
        """
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, request.view)
        with self.lm.scoring():
            hidden_ND = self._hidden(pack, prompts)
            unchanged = head or self._unchanged_head()
        dense = self.dense(pack.steps.tokens_N, hidden_ND, request.temperature, unchanged)
        valid_N = prompts.valid_N(pack)
        dense = replace(dense, valid_N=None if valid_N is None else valid_N.to(self.lm.device), counts=prompts.counts)
        found = dense if request.whole else reduced(dense, request.needs, request.student_ids_NK)
        return found if not request.ahead else self._ahead(found, pack, prompts, request, unchanged)

    def _ahead(
        self, found: TeacherSignal, pack: Pack, prompts: Prompts, request: ScoreRequest, head: Callable[[], Head]
    ) -> Ahead:
        """The signal with a look one token ahead beside it."""
        if request.student_ids_NK is None:
            raise SignalError(f"{self.name}: to look ahead it must be given the student's most likely ids")
        ids_NK = request.student_ids_NK[:, : request.ahead]
        valid_N, chosen_N = prompts.valid_N(pack), request.ahead_N
        chosen_N = torch.ones(len(pack), dtype=torch.bool) if chosen_N is None else chosen_N
        read_N = torch.ones_like(chosen_N) if valid_N is None else valid_N
        with self.lm.scoring():
            sure_NK = look_ahead(
                self.sequences(pack, prompts),
                their_ids(self.alignment, ids_NK[read_N]),
                chosen_N[read_N],
                # Branches are read once and never again, so states are not looked for in a cache.
                lambda sequences, forks: branch_states(self.lm, sequences, forks, self.batch_tokens),
                lambda tokens_B, hidden_BD: self.dense(tokens_B, hidden_BD, request.temperature, head),
                self.lm.context,
            )
        everywhere_NK = torch.full(ids_NK.shape, math.nan, dtype=sure_NK.dtype)
        everywhere_NK[read_N] = sure_NK
        device = found.tokens_N.device
        return Ahead.beside(found, ids_NK.to(device), everywhere_NK.to(device))

    def dense(self, tokens_N: Tensor, hidden_ND: Tensor, temperature: float, head: Callable[[], Head]) -> Dense:
        """The whole distribution at some steps, of which nothing is computed before it is read.

        Args:
            tokens_N: The student's ids that were decided.
            hidden_ND: The model's hidden states there.
            temperature: Of the distributions.
            head: Gives the head.
        """
        logits, logits_of = self._logits, self._logits_of
        return Dense(
            tokens_N.to(self.lm.device),
            self.name,
            lambda index_C: logits(head(), hidden_ND[index_C], temperature),
            self.alignment.vocab,
            temperature,
            hidden=lambda index_C: hidden_ND[index_C],
            factors=Factors(
                lambda index_C: hidden_ND[index_C],
                lambda hidden_CD, ids: logits_of(head(), hidden_CD, ids, temperature),
                lambda hidden_CD: logits(head(), hidden_CD, temperature),
            ),
        )

    def _unchanged_head(self) -> Callable[[], Head]:
        if self.lm.sharding.spreads_head:
            kept = self.lm.head().each(lambda part: part.detach().clone())  # gathered, and gone after this pass
            return lambda: kept
        version = self.lm.head().weight_VD._version  # pyright: ignore[reportPrivateUsage]

        def head() -> Head:
            found = self.lm.head()
            if found.weight_VD._version != version:  # pyright: ignore[reportPrivateUsage]
                raise SignalError(f"{self.name}: the teacher's head changed after it had scored this batch")
            return found

        return head

    def _hidden(self, pack: Pack, prompts: Prompts) -> Tensor:
        """Hidden states at every step, [N, D]; zeros where there is no context."""
        valid_N = prompts.valid_N(pack)
        hidden_ND = self.hidden_states(self.sequences(pack, prompts))
        if valid_N is None:
            return hidden_ND
        index_N = valid_N.nonzero().squeeze(-1).to(hidden_ND.device)
        return hidden_ND.new_zeros(len(pack), hidden_ND.shape[1]).index_copy_(0, index_N, hidden_ND)

    def _logits(self, head: Head, hidden_CD: Tensor, temperature: float) -> Tensor:
        with torch.no_grad(), self.lm.compute():
            logits_CW = head.logits(hidden_CD, self.alignment.width)
        return self.alignment.logits(logits_CW, temperature)

    def _logits_of(self, head: Head, hidden_CD: Tensor, ids: slice, temperature: float) -> Tensor:
        """Some columns of `_logits`."""
        with torch.no_grad(), self.lm.compute():
            return self.alignment.logits_of(lambda theirs: head.rows(theirs).logits(hidden_CD), ids, temperature)


def reduced(dense: Dense, needs: frozenset[Need], student_ids_NK: Tensor | None = None) -> TeacherSignal:
    """The smallest signal that meets the needs, computed chunk by chunk.

    Args:
        dense: The whole distribution.
        needs: The needs.
        student_ids_NK: The ids of a need `logp_at`.
    """
    found = numbers(dense, needs, student_ids_NK)
    return signal_from(found, dense, student_ids_NK, whole=kept_ids(needs) >= dense.width)


@torch.no_grad()
def numbers(dense: Dense, needs: frozenset[Need], student_ids_NK: Tensor | None = None) -> dict[str, Tensor]:
    """The numbers that meet the needs, by name, computed chunk by chunk; see `signal_from`."""
    kinds, top_k = {need.kind for need in needs}, kept_ids(needs)
    blocks: list[dict[str, Tensor]] = []
    start = 0
    for rows in in_blocks(dense, dense.width):
        block = {"sampled": rows.sampled_logp_N}
        here = slice(start, start + len(block["sampled"]))
        if "entropy" in kinds:
            block["entropy"] = rows.entropy_N
        if top_k:
            block["ids"], block["logp"] = rows.topk(top_k)
        if student_ids_NK is not None:
            block["at"] = rows.logp_at(student_ids_NK[here].to(dense.tokens_N.device))
        blocks.append(block)
        start = here.stop
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def signal_from(
    found: Mapping[str, Tensor], about: TeacherSignal, student_ids_NK: Tensor | None = None, *, whole: bool = False
) -> TeacherSignal:
    """The smallest signal that holds some numbers.

    Args:
        found: `sampled` [N]; as the needs ask `entropy` [N], `ids` and `logp` [N, K] of the most likely ids, and `at`
            [N, K], log-probs of the ids of a need `logp_at`.
        about: A signal about the same steps, of the same source.
        student_ids_NK: The ids of a need `logp_at`.
        whole: Whether `ids` are all ids.
    """
    tokens_N, valid_N, counts = about.tokens_N, about.valid_N, about.counts
    top = TopK(
        tokens_N,
        about.source,
        ids_NK=found.get("ids", tokens_N.new_empty(about.steps, 0)),
        logp_NK=found.get("logp", tokens_N.new_empty(about.steps, 0, dtype=torch.float32)),
        sampled_logp_N=found["sampled"],
        entropy_N=found.get("entropy"),
        whole=whole,
        valid_N=valid_N,
        counts=counts,
    )
    if student_ids_NK is None and "ids" not in found and "entropy" not in found:
        return Sampled(tokens_N, about.source, found["sampled"], valid_N=valid_N, counts=counts)
    if student_ids_NK is None:
        return top
    ids_NK = student_ids_NK.to(tokens_N.device)
    return Candidates(
        tokens_N, about.source, ids_NK, found["at"], found["sampled"], top, valid_N=valid_N, counts=counts
    )


def kept_ids(needs: frozenset[Need]) -> int:
    """The number of the teacher's most likely ids that the needs ask for."""
    return max((need.k for need in needs if need.kind == "topk"), default=0)
