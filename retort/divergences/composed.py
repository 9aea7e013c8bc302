"""Reverse KL to a teacher composed of several models. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import DENSE, Need
from retort.core.parts import Divergence, Quantity

#: The views of the better and of the worse model of a pair, and the weight of their difference.
Pair = tuple[str, str, float]


def composed(context: Context, base: str, pairs: Sequence[Pair]) -> Distribution:
    r"""The distribution :math:`\mathrm{softmax}(z_B + \sum_k \alpha_k (z_k^+ - z_k^-))`, computed once per block.

    An id that the base or a better model rules out stays ruled out; one that only a worse model rules out is left as
    the others have it.
    """

    def make() -> Distribution:
        start = context.signal(base).distribution
        logits_CV = start.logp_CV
        for plus, minus, weight in pairs:
            if weight == 0.0:
                continue
            better_CV = context.signal(plus).distribution.logp_CV
            worse_CV = context.signal(minus).distribution.logp_CV
            apart_CV = torch.where(worse_CV == -math.inf, 0.0, better_CV - worse_CV)
            banned_CV = (logits_CV == -math.inf) | (better_CV == -math.inf)
            logits_CV = (logits_CV + weight * apart_CV).masked_fill(banned_CV, -math.inf)
        return Distribution(logits_CV, start.shard)

    return context.once(("composed", base, tuple(pairs)), make)


def composed_reverse_kl(base: str, pairs: Sequence[Pair]) -> Divergence:
    """Reverse KL of the student to `composed`, over the whole vocabulary, nats.

    Args:
        base: The view that is started from.
        pairs: Views of a better and of a worse model, and the weight of their difference.
    """

    def value(context: Context, view: str) -> Tensor:
        return context.student.reverse_kl(composed(context, base, pairs))

    weights = ", ".join(f"{weight:g} ({plus} - {minus})" for plus, minus, weight in pairs)
    return Divergence(f"reverse_kl({base} + {weights})", value, frozenset(), _of(base, pairs))


def composed_entropy(base: str, pairs: Sequence[Pair]) -> Quantity:
    """Entropy of `composed`, nats."""

    def value(context: Context, view: str) -> Tensor:
        return composed(context, base, pairs).entropy()

    return Quantity("composed_entropy", value, frozenset(), _of(base, pairs))


def _of(base: str, pairs: Sequence[Pair]) -> dict[str, frozenset[Need]]:
    return {view: frozenset({DENSE}) for view in (base, *(name for pair in pairs for name in pair[:2]))}
