"""A teacher behind a server of completions (vLLM, and others as far as they go). Axis letters: see `retort.core`.

W is the number of ids of the server's model. What such a server cannot give: its distribution at a temperature other
than 1, hidden states, and unless it lists all ids the exact entropy (docs/endpoints.md).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.core.needs import Capability, Need, logp_at
from retort.core.rollouts import Group, Pack
from retort.core.sequences import TokenSequence
from retort.core.signals import Candidates, Dense, Sampled, TeacherSignal, TopK, entropy_lower_bound
from retort.errors import SignalError
from retort.models.endpoint import EndpointModel
from retort.teachers.base import ScoreRequest
from retort.teachers.local import reduced
from retort.teachers.reader import Reader
from retort.wire.completions import Listed

#: Ids from which a lower bound of the entropy is computed, where no top-k is asked for besides.
_BOUND_FROM = 20


class EndpointTeacher(Reader):
    """A model behind a server of completions; what it can give is what its server was found to offer.

    A further stop of its own counts as an ordinary token, unless the server lists all ids: the probability that the
    student's stop gets from it is not known.
    """

    lm: EndpointModel

    @property
    def capabilities(self) -> frozenset[Capability]:
        """See `Teacher`."""
        offers = self.lm.server.offers
        if offers.whole:
            return frozenset({"sampled", "dense"})
        found: set[Capability] = {"sampled"}
        if offers.top:
            found |= {Need("topk", offers.top), "entropy_bound"}
        if offers.at:
            found.add(logp_at(offers.at))
        return frozenset(found)

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        """See `Teacher`.

        Raises:
            SignalError: The server gives what is no log-prob of what it was sent.
            UserError: The server refuses a request.
            UnreachableError: The server does not answer.
        """
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, request.view)
        sequences = self.sequences(pack, prompts)
        rest: dict[str, Any] = {"valid_N": prompts.valid_N(pack), "counts": prompts.counts}
        kinds = {need.kind for need in request.needs}
        exact = "entropy" in kinds and not all(need.or_bound for need in request.needs if need.kind == "entropy")
        if self.lm.server.offers.whole and (request.whole or request.temperature != 1.0 or kinds != {"sampled"}):
            dense = self._dense(pack, sequences, request.temperature, rest)
            return dense if request.whole else reduced(dense, request.needs, request.student_ids_NK)
        if request.temperature != 1.0 or exact:
            raise SignalError(f"{self.name}: it gives no whole distribution, which the request takes")
        return self._listed(pack, sequences, request, rest)

    def _listed(
        self, pack: Pack, sequences: Sequence[TokenSequence], request: ScoreRequest, rest: dict[str, Any]
    ) -> TeacherSignal:
        """A signal of some ids."""
        kinds, ids_NK = {need.kind for need in request.needs}, request.student_ids_NK
        bound = not kinds.isdisjoint({"entropy", "entropy_bound"})
        top = max((need.k for need in request.needs if need.kind == "topk"), default=0)
        most = max(top, min(_BOUND_FROM, self.lm.server.offers.top)) if bound else top
        lists, spread = self._answers(sequences, most), _Spread(pack, rest["valid_N"])
        tokens_N = pack.steps.tokens_N
        own_M = [own[token] for own, token in zip(lists, _decided(sequences), strict=True)]
        sampled_N = spread(torch.tensor(own_M, dtype=torch.float32))
        if ids_NK is None and not most:
            return Sampled(tokens_N, self.name, sampled_N, **rest)
        listed = None
        if most:
            ids_MK, logp_MK = self._top(lists, sequences, most)
            entropy_N = spread(entropy_lower_bound(logp_MK)) if bound else None
            kept_NK = spread(ids_MK)[:, :top], spread(logp_MK, -math.inf)[:, :top]
            listed = TopK(tokens_N, self.name, *kept_NK, sampled_N, entropy_N, entropy_exact=not bound, **rest)
        if ids_NK is None:
            assert listed is not None
            return listed
        return Candidates(tokens_N, self.name, ids_NK, self._at(sequences, ids_NK, spread), sampled_N, listed, **rest)

    def _answers(self, sequences: Sequence[TokenSequence], top: int) -> list[Listed]:
        """What the server lists at every decided token, in order."""
        found = self.lm.server.listed([_ids(own)[: own.end] for own in sequences], top)
        pairs = zip(found, sequences, strict=True)
        return [lists[place - 1] for lists, own in pairs for place in own.action_mask_L.nonzero().squeeze(-1).tolist()]

    def _top(self, lists: Sequence[Listed], sequences: Sequence[TokenSequence], k: int) -> tuple[Tensor, Tensor]:
        """The k most likely ids, the student's, and their log-probs [M, K], M being all tokens with a context.

        A list is as long as there are ids that the student has; what is left of it holds minus infinity.
        """
        ids_MK = torch.zeros(len(lists), k, dtype=torch.long)
        logp_MK = torch.full((len(lists), k), -math.inf)
        for row, (own, token) in enumerate(zip(lists, _decided(sequences), strict=True)):
            # The written token is listed besides the k, so of equals it is the last.
            best = heapq.nsmallest(k, own, key=lambda i, own=own, token=token: (-own[i], i == token))
            known = [(ours, own[i]) for ours, i in zip(self._ours(best), best, strict=True) if ours >= 0]
            if known:
                ids, logps = zip(*known, strict=True)
                ids_MK[row, : len(ids)], logp_MK[row, : len(ids)] = torch.tensor(ids), torch.tensor(logps)
        return ids_MK, logp_MK

    def _ours(self, ids: Sequence[int]) -> list[int]:
        """Ids of the teacher's as the student reads them; -1 where the student has none."""
        swap, vocab = self.alignment.stops.swap, self.alignment.vocab
        found = (swap.get(token, token) for token in self.alignment.to_student(ids))
        return [token if token < vocab else -1 for token in found]

    def _at(self, sequences: Sequence[TokenSequence], ids_NK: Tensor, spread: Callable[..., Tensor]) -> Tensor:
        """The log-probs of ids that the student chose, [N, K]; minus infinity where there is no context."""
        own_MK = spread.rows(ids_NK)  # type: ignore[attr-defined]
        asked = TokenSequence.of([0]).then(own_MK.flatten().tolist(), decided=True)
        theirs_MK = self.alignment.read(asked).actions_A.reshape(own_MK.shape)
        prefixes = [
            ids[:place]
            for own in sequences
            for ids in [_ids(own)]
            for place in own.action_mask_L.nonzero().squeeze(-1).tolist()
        ]
        theirs: list[list[int]] = theirs_MK.tolist()
        found = self.lm.server.at(prefixes, theirs)
        logp = [[own[token] for token in ids] for own, ids in zip(found, theirs, strict=True)]
        return spread(torch.tensor(logp, dtype=torch.float32).reshape(theirs_MK.shape), -math.inf)

    def _dense(self, pack: Pack, sequences: Sequence[TokenSequence], temperature: float, rest: dict[str, Any]) -> Dense:
        """A signal of all ids that student and teacher share."""
        width = self.alignment.width
        lists = self._answers(sequences, -1)
        if any(token not in own for own in lists for token in range(width)):
            raise SignalError(f"{self.name}: it was asked for all of its ids, and leaves some out")
        logp_MW = torch.tensor([[own[token] for token in range(width)] for own in lists]).reshape(-1, width)
        logp_NW = _Spread(pack, rest["valid_N"])(logp_MW)

        def rows(index_C: Tensor | slice) -> Tensor:
            return self.alignment.logits(logp_NW[index_C].clone(), temperature)

        return Dense(pack.steps.tokens_N, self.name, rows, self.alignment.vocab, temperature, **rest)


class _Spread:
    """From the M steps that have a context to all N."""

    def __init__(self, pack: Pack, valid_N: Tensor | None) -> None:
        self.index_M = torch.arange(len(pack)) if valid_N is None else valid_N.nonzero().squeeze(-1)
        self.steps = len(pack)

    def __call__(self, values_M: Tensor, otherwise: float = 0) -> Tensor:
        filled = values_M.new_full((self.steps, *values_M.shape[1:]), otherwise)
        return filled.index_copy(0, self.index_M, values_M)

    def rows(self, values_N: Tensor) -> Tensor:
        """Those of the M steps."""
        return values_N.cpu()[self.index_M]


def _ids(sequence: TokenSequence) -> list[int]:
    return sequence.tokens_L.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _decided(sequences: Sequence[TokenSequence]) -> list[int]:
    return [token for own in sequences for token in own.actions_A.tolist()]  # pyright: ignore
