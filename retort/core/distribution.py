"""One categorical distribution per step, and divergences between two. Axis letters: see `retort.core`.

The gradient of every number here has a closed form, computed from the probabilities on demand. A divergence over
150,000 ids then costs a few passes over them, and keeps two tensors of that size where autograd keeps seven.
`retort.divergences.kl_values` and `jsd_values` are the definitions; these must equal them in value and gradient. So the
gradient of reverse KL is in `Distribution.reverse_kl`, that of forward KL in `Distribution.forward_kl`; the values of
both are computed in `_kl`.

With a `Shard` the ids are spread over ranks. Each holds the logits of its own ids; only sums per step are exchanged.

On a GPU `retort.kernels` computes the numbers of a whole distribution in fp32, in one pass over the logits, and their
gradients in another, and keeps only the logits (`RETORT_KERNELS=0` in the environment leaves it to torch). The results
equal those of torch with one exception: a step's gradient is NaN where a nonzero gradient flows back to an infinite
reverse KL.
"""

# pyright: basic
from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retort.core.needs import NeedKind
from retort.core.policy import Policy


class Shard:
    """The ids that logits are about: here, all of them. `retort.core.shard.VocabShard` is one rank's slice of them."""

    #: Whether ranks have to exchange numbers.
    spread: bool = False

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, of the same shape."""
        return values

    def logsumexp(self, logits_CV: Tensor) -> Tensor:
        """Log-sum-exp over all ids, [C]."""
        return logits_CV.logsumexp(-1)

    def local(self, ids_CK: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """Columns of the given ids in logits of `width` columns, and which of the ids are here (None: all of them)."""
        return ids_CK, None

    def topk(self, logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` largest logits of each row (all, if there are fewer) and their ids, [C, K] each."""
        found = logits_CV.topk(min(k, logits_CV.shape[-1]), dim=-1)
        return found.values, found.indices


WHOLE = Shard()

#: exp(x) is computed as exp2(x log2(e)), which took a third of the time on the CPUs measured (docs/performance.md).
_LOG2_E = math.log2(math.e)

#: Whether to use `retort.kernels`; None uses them where they work on a GPU. Tests set True to run Triton's interpreter.
KERNELS: bool | None = {"0": False, "1": True}.get(os.environ.get("RETORT_KERNELS", ""))


def as_compute(values: Tensor) -> Tensor:
    """Casts to the dtype of softmaxes and sums: fp32, or float64 if the input is."""
    return values if values.dtype == torch.float64 else values.float()


class _Value(torch.autograd.Function):
    """A number per step whose gradient with respect to the logits is a formula."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, value: Tensor, gradient: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.gradient = gradient
        # A copy of the value: the formula may hold the value, and would then hold the graph that holds the formula.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept: tuple[Tensor, ...] = ctx.saved_tensors
        return (ctx.gradient(upstream, *kept), None, None, *(None for _ in kept))


class Distribution(Policy):
    """Quantities of a distribution given by its logits, each computed once and on demand.

    Attributes:
        logits_CV: fp32, or float64 if the input was; live if they are the student's.
        shard: The ids that the logits are about.
    """

    offers: frozenset[NeedKind] = frozenset({"dense"})

    def __init__(self, logits_CV: Tensor, shard: Shard = WHOLE) -> None:
        """Takes logits [C, V] in fp32 or float64."""
        self.logits_CV = logits_CV
        self.shard = shard
        self._plain_CV = logits_CV.detach()
        self._gaps: dict[int, tuple[Distribution, Tensor]] = {}
        self._kls: dict[tuple[int, bool], Tensor] = {}
        self._kernels = _kernels(logits_CV, shard)
        self._statistics: dict[tuple[int, float | None], tuple[Distribution, Any]] = {}

    # --- detached ---

    @cached_property
    def normaliser_C(self) -> Tensor:
        """Log-sum-exp of the logits, detached; not finite if a logit is NaN or +inf, or if all are -inf."""
        if self._kernels is not None:
            return self._own.student_lse_C
        return self._wide_normaliser_C.to(self._plain_CV.dtype)

    @cached_property
    def _wide_normaliser_C(self) -> Tensor:
        """The same in float64, where the ids are all here: two are subtracted for a KL far smaller than either."""
        if self._kernels is not None:
            return self.normaliser_C
        return self.shard.logsumexp(self._plain_CV) if self.shard.spread else self._exponentials[0]

    @cached_property
    def logp_CV(self) -> Tensor:
        """Log-probs, nats, detached."""
        return self._plain_CV - self.normaliser_C[:, None]

    @cached_property
    def p_CV(self) -> Tensor:
        """Probabilities, detached."""
        if self.shard.spread or self._kernels is not None:
            return self.logp_CV.exp()
        _, powers_CV, total_C1 = self._exponentials
        return powers_CV.mul_(total_C1.reciprocal().to(powers_CV.dtype))  # nothing else reads the powers

    @cached_property
    def _exponentials(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exp in float64, powers that are proportional to the probabilities, and their sums in float64."""
        top_C1 = self._plain_CV.amax(-1, keepdim=True)
        top_C1 = top_C1.masked_fill_(top_C1.isinf(), 0.0)
        powers_CV = (self._plain_CV - top_C1).mul_(_LOG2_E).exp2_()
        total_C1 = powers_CV.sum(-1, keepdim=True, dtype=torch.float64)
        return (top_C1 + total_C1.log()).squeeze(-1), powers_CV, total_C1

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` most likely ids [C, K] and their log-probs, nats, detached."""
        logits_CK, ids_CK = self.shard.topk(self._plain_CV, k)
        return ids_CK, logits_CK - self.normaliser_C[:, None]

    # --- differentiable in the logits ---

    def logp_of(self, decided: Tensor) -> Tensor:
        """Log-probs [C] of the tokens that were decided, [C], nats."""
        return self.logp_at(decided[:, None]).squeeze(-1)

    def logp_at(self, ids_CK: Tensor) -> Tensor:
        """Log-probs [C, K] of given ids, nats."""
        here_CK, mine_CK = self.shard.local(ids_CK, self._plain_CV.shape[-1])
        logits_CK = self._plain_CV.gather(-1, here_CK)
        if mine_CK is not None:
            logits_CK = self.shard.sum(logits_CK.masked_fill(~mine_CK, 0.0))
        value_CK = logits_CK - self.normaliser_C[:, None]
        if self._kernels is not None:
            return self._from_kernels(value_CK, self._own, "ids_grad_CK", ids_CK=ids_CK)

        def gradient(upstream_CK: Tensor, p_CV: Tensor) -> Tensor:
            gradient_CV = p_CV * -upstream_CK.sum(-1, keepdim=True)
            mine = upstream_CK if mine_CK is None else upstream_CK.masked_fill(~mine_CK, 0.0)
            return gradient_CV.scatter_add_(-1, here_CK, mine)

        return self._live(value_CK, gradient, lambda: (self.p_CV,))

    def logp_outside(self, ids_CK: Tensor, inside_CK: Tensor) -> Tensor:
        """Log of the probability of all ids but the given ones, [C], nats; minus infinity where nothing is left.

        The sum runs over those ids: in fp32, one minus a sum near 1 has no digits left, and no gradient.

        Args:
            ids_CK: Ids [C, K].
            inside_CK: Mask [C, K] of the ids to leave out; the others in `ids_CK` count as not given.
        """
        here_CK, mine_CK = self.shard.local(ids_CK, self._plain_CV.shape[-1])
        meant_CK = inside_CK if mine_CK is None else inside_CK & mine_CK
        # An id may occur twice, once inside the mask and once outside.
        given_CV = torch.zeros_like(self._plain_CV).scatter_add_(-1, here_CK, meant_CK.to(self._plain_CV.dtype)) > 0
        rest_C = self.shard.logsumexp(self._plain_CV.masked_fill(given_CV, -math.inf))

        def gradient(upstream_C: Tensor, p_CV: Tensor, logits_CV: Tensor, given_CV: Tensor) -> Tensor:
            some_C1 = (rest_C > -math.inf)[:, None]
            among_CV = (logits_CV - rest_C.masked_fill(rest_C == -math.inf, 0.0)[:, None]).exp()
            among_CV = among_CV.masked_fill_(given_CV, 0.0).sub_(p_CV).mul_(upstream_C[:, None])
            return among_CV.masked_fill_(~some_C1, 0.0)

        return self._live(rest_C - self.normaliser_C, gradient, lambda: (self.p_CV, self._plain_CV, given_CV))

    def entropy(self) -> Tensor:
        """Entropy [C], nats; an impossible id contributes nothing."""
        if self._kernels is not None:
            return self._from_kernels(self._own.student_entropy_C, self._own, "entropy_C")
        value_C = -self.shard.sum(torch.linalg.vecdot(self.p_CV, self.logp_CV))
        logp_CV = self.logp_CV
        if not _finite(value_C):
            logp_CV = logp_CV.clamp_min(torch.finfo(logp_CV.dtype).min)
            value_C = -self.shard.sum(torch.linalg.vecdot(self.p_CV, logp_CV))

        def gradient(upstream_C: Tensor, p_CV: Tensor, logp_CV: Tensor) -> Tensor:
            return (logp_CV + value_C[:, None]).mul_(p_CV).mul_(-upstream_C[:, None])

        return self._live(value_C, gradient, lambda: (self.p_CV, logp_CV))

    def forward_kl(self, teacher: Distribution) -> Tensor:
        """KL(teacher || self), [C], nats; infinite where this one rules out an id that the teacher does not."""
        if self._both_on_kernels(teacher):
            statistics = self._against(teacher)
            return self._from_kernels(statistics.forward_kl_C, statistics, "forward_C", teacher)
        value_C = self._kl(teacher, forward=True)

        def gradient(upstream_C: Tensor, p_CV: Tensor, q_CV: Tensor) -> Tensor:
            return (p_CV - q_CV).mul_(upstream_C[:, None])

        return self._live(value_C, gradient, lambda: (self.p_CV, teacher.p_CV))

    def reverse_kl(self, teacher: Distribution) -> Tensor:
        """KL(self || teacher), [C], nats; infinite where the teacher rules out an id that this one does not."""
        if self._both_on_kernels(teacher):
            statistics = self._against(teacher)
            return self._from_kernels(statistics.reverse_kl_C, statistics, "reverse_C", teacher)
        value_C = self._kl(teacher, forward=False)
        gap_CV = self._gap(teacher)

        def gradient(upstream_C: Tensor, p_CV: Tensor, gap_CV: Tensor) -> Tensor:
            # Not the value itself: behind a closed gate it may be infinite, and infinity times 0 is NaN.
            mean_C = value_C if _finite(value_C) else self._mean(p_CV, gap_CV)
            return (gap_CV - mean_C[:, None]).mul_(p_CV).mul_(upstream_C[:, None])

        return self._live(value_C, gradient, lambda: (self.p_CV, gap_CV))

    def jsd(self, teacher: Distribution, teacher_weight: float) -> Tensor:
        """Jensen-Shannon divergence [C] with `teacher_weight` on the teacher, nats; always finite."""
        w = teacher_weight
        if self._both_on_kernels(teacher):
            statistics = self._against(teacher, w)
            return self._from_kernels(statistics.jsd_C, statistics, "jsd_C", teacher, jsd_weight=w)
        mixture_CV = torch.logaddexp(teacher.logp_CV + math.log(w), self.logp_CV + math.log1p(-w))
        ours_CV, theirs_CV = self.logp_CV - mixture_CV, teacher.logp_CV - mixture_CV
        ours_C, theirs_C = self._mean(self.p_CV, ours_CV), self._mean(teacher.p_CV, theirs_CV)
        if not _finite(ours_C + theirs_C):  # an id that a side rules out contributes 0 to that side's mean
            ours_CV = ours_CV.masked_fill(self.logp_CV == -math.inf, 0.0)
            theirs_CV = theirs_CV.masked_fill(teacher.logp_CV == -math.inf, 0.0)
            ours_C, theirs_C = self._mean(self.p_CV, ours_CV), self._mean(teacher.p_CV, theirs_CV)

        def gradient(upstream_C: Tensor, p_CV: Tensor, ours_CV: Tensor) -> Tensor:
            return (ours_CV - ours_C[:, None]).mul_(p_CV).mul_((1.0 - w) * upstream_C[:, None])

        return self._live(w * theirs_C + (1.0 - w) * ours_C, gradient, lambda: (self.p_CV, ours_CV))

    def of_entries(self, value_CV: Tensor, slope_CV: Tensor) -> Tensor:
        """Sums numbers over ids, each of which depends only on the log-prob of its own id, [C].

        Args:
            value_CV: The numbers f_v(log p_v), detached.
            slope_CV: Their derivatives f_v'(log p_v), detached and finite.
        """
        value_C, slope_C = self.shard.sum(value_CV.sum(-1)), self.shard.sum(slope_CV.sum(-1))

        def gradient(upstream_C: Tensor, p_CV: Tensor, slope_CV: Tensor) -> Tensor:
            return (slope_CV - p_CV * slope_C[:, None]).mul_(upstream_C[:, None])

        return self._live(value_C, gradient, lambda: (self.p_CV, slope_CV))

    # --- from the kernels ---

    @cached_property
    def _own(self) -> Any:
        """Statistics that hold this one's normaliser and entropy; an earlier comparison holds them as well."""
        assert self._kernels is not None
        for _, statistics in self._statistics.values():
            return statistics
        return self._kernels.row_statistics(self._plain_CV)

    def _both_on_kernels(self, teacher: Distribution) -> bool:
        return self._kernels is not None and teacher._kernels is not None

    def _against(self, teacher: Distribution, jsd_weight: float | None = None) -> Any:
        assert self._kernels is not None
        key = (id(teacher), jsd_weight)
        if key not in self._statistics:
            statistics = self._kernels.row_statistics(self._plain_CV, teacher._plain_CV, jsd_weight=jsd_weight)
            self._statistics[key] = (teacher, statistics)  # holding the teacher keeps its id from being given out again
        return self._statistics[key][1]

    def _from_kernels(
        self, value: Tensor, statistics: Any, name: str, teacher: Distribution | None = None, **known: Any
    ) -> Tensor:
        """A number whose gradient is `row_gradient`, with the upstream gradient passed under `name`."""
        kernels = self._kernels
        assert kernels is not None

        def gradient(upstream: Tensor, logits_CV: Tensor, teacher_CV: Tensor | None = None) -> Tensor:
            return kernels.row_gradient(logits_CV, teacher_CV, statistics, **known, **{name: upstream})

        kept = (self._plain_CV,) if teacher is None else (self._plain_CV, teacher._plain_CV)
        return self._live(value, gradient, lambda: kept)

    # --- inside ---

    def _live(self, value: Tensor, gradient: Callable[..., Tensor], kept: Callable[[], tuple[Tensor, ...]]) -> Tensor:
        if not (self.logits_CV.requires_grad and torch.is_grad_enabled()):
            return value
        return _Value.apply(self.logits_CV, value, gradient, *kept())  # pyright: ignore[reportReturnType]

    def _mean(self, p_CV: Tensor, values_CV: Tensor) -> Tensor:
        return self.shard.sum(torch.linalg.vecdot(p_CV, values_CV))

    def _gap(self, teacher: Distribution) -> Tensor:
        """Log p - log q [C, V], detached; 0 at impossible ids once a KL was not finite."""
        if id(teacher) not in self._gaps:
            offset_C1 = (self._wide_normaliser_C - teacher._wide_normaliser_C).to(self._plain_CV.dtype)[:, None]
            # Holding the teacher keeps its id from being given out again.
            self._gaps[id(teacher)] = (teacher, (self._plain_CV - teacher._plain_CV).sub_(offset_C1))
        return self._gaps[id(teacher)][1]

    def _kl(self, teacher: Distribution, *, forward: bool) -> Tensor:
        """The forward or the reverse KL, [C], detached, computed once."""
        key = (id(teacher), forward)
        if key not in self._kls:
            weight_CV, sign = (teacher.p_CV, -1) if forward else (self.p_CV, 1)
            value_C = sign * self._mean(weight_CV, self._gap(teacher))
            self._kls[key] = value_C
            if not _finite(value_C):  # the gap becomes 0 at impossible ids, so neither side is computed from it again
                for way in (False, True):
                    self._kls[id(teacher), way] = self._kl_of_possible(teacher, forward=way)
        return self._kls[key]

    def _kl_of_possible(self, teacher: Distribution, *, forward: bool) -> Tensor:
        """The same where one side rules out an id (-inf), or a row is no distribution.

        Such an id adds 0 to the KL from that side and infinity to the KL from the other. A row that is no distribution
        stays NaN.
        """
        ours_CV, theirs_CV = self._plain_CV > -math.inf, teacher._plain_CV > -math.inf
        gap_CV = torch.where(ours_CV & theirs_CV, self._gap(teacher), 0.0)
        self._gaps[id(teacher)] = (teacher, gap_CV)
        sound_C = (self.normaliser_C + teacher.normaliser_C).isfinite()
        weight_CV, sign = (teacher.p_CV, -1) if forward else (self.p_CV, 1)
        banned_CV = theirs_CV & ~ours_CV if forward else ours_CV & ~theirs_CV
        banned_C = self.shard.sum(banned_CV.any(-1).to(gap_CV.dtype)) > 0
        value_C = (sign * self._mean(weight_CV, gap_CV)).masked_fill(banned_C, math.inf)
        return value_C.masked_fill(~sound_C, math.nan)


def _kernels(logits_CV: Tensor, shard: Shard) -> Any | None:
    """The module whose kernels compute the numbers of these logits, or None where torch does."""
    if KERNELS is False or shard.spread or logits_CV.dtype != torch.float32:
        return None
    if KERNELS is None and not logits_CV.is_cuda:
        return None
    # Imported only now: most machines have no GPU, and this module needs nothing but torch there.
    if KERNELS is None and not importlib.import_module("retort.kernels").available(logits_CV.device):
        return None
    return importlib.import_module("retort.kernels.triton_rows")


def _finite(values_C: Tensor) -> bool:
    return bool(values_C.isfinite().all())
