"""A vocabulary spread over the ranks of a process group. Axis letters: see `retort.core`."""

# pyright: basic
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from retort.core.distribution import Shard


@dataclass(frozen=True)
class VocabShard(Shard):
    """The ids from `start` on, one slice per rank; no rank ever holds the others' rows or logits.

    Ranks exchange a few numbers per step: the largest logit, weighted sums of probabilities, and the candidates of a
    top-k. All ranks must ask for the same quantities of the same steps, in the same order.

    Attributes:
        start: First id of this rank.
        group: Process group; None for all ranks.
    """

    start: int
    group: Any = None
    spread: bool = True

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, operation, self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sums over ranks by an all-reduce."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def logsumexp(self, logits_CV: Tensor) -> Tensor:
        """Log-sum-exp by two all-reduces of [C]: the largest logit, then the sum of the shifted exponentials."""
        largest_C = self._reduced(logits_CV.amax(-1), distributed.ReduceOp.MAX)
        shift_C = largest_C.masked_fill(largest_C == -torch.inf, 0.0)  # all ids are ruled out: log 0, not NaN
        return self.sum((logits_CV - shift_C[:, None]).exp().sum(-1)).log() + shift_C

    def local(self, ids_CK: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """See `Shard.local`."""
        here_CK = ids_CK - self.start
        return here_CK.clamp(0, width - 1), (here_CK >= 0) & (here_CK < width)

    def topk(self, logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Gathers each rank's own candidates, and takes the best of them."""
        rows, width = logits_CV.shape
        best = logits_CV.topk(min(k, width), dim=-1)
        candidates_CK = torch.full((rows, k), -torch.inf, dtype=logits_CV.dtype, device=logits_CV.device)
        ids_CK = torch.zeros((rows, k), dtype=torch.long, device=logits_CV.device)
        candidates_CK[:, : best.values.shape[1]] = best.values
        ids_CK[:, : best.indices.shape[1]] = best.indices + self.start
        ranks = distributed.get_world_size(self.group)
        all_values = [torch.empty_like(candidates_CK) for _ in range(ranks)]
        all_ids = [torch.empty_like(ids_CK) for _ in range(ranks)]
        distributed.all_gather(all_values, candidates_CK, self.group)
        distributed.all_gather(all_ids, ids_CK, self.group)
        total = int(self.sum(torch.tensor(width, device=logits_CV.device)))
        found = torch.cat(all_values, dim=-1).topk(min(k, total), dim=-1)
        return found.values, torch.cat(all_ids, dim=-1).gather(-1, found.indices)
