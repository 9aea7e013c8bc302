"""Estimators of the divergence from the sampled token alone. Axis letters: see `retort.core`.

With d = log p_S(y) - log p_T(y) for y drawn from the student, k1 = d, k2 = d^2 / 2 and k3 = exp(-d) - 1 + d. As
*values* all three estimate the reverse KL (k2 with a bias). Their gradients differ, and each docstring names the
divergence that its gradient descends. Against a teacher with another tokenizer, d is that of a unit of tokens, and the
value is at the unit's first step.
"""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Divergence


def _gap(context: Context, view: str) -> Tensor:
    return context.live_logp_N(view) - context.signal(view).sampled_logp_N


def k1() -> Divergence:
    """The log-ratio d itself. Use it only as a (detached) reward: see `not_pathwise`."""

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).first_only(_gap(context, view))

    return Divergence(
        "k1",
        value,
        frozenset({SAMPLED}),
        not_pathwise=(
            "the gradient of k1 does not depend on the teacher (its expectation is zero); "
            "use score_function(log_ratio()) for the reverse KL, or pathwise(k2())"
        ),
    )


def k2() -> Divergence:
    """d^2 / 2: back-propagated on student samples, an unbiased gradient of the *reverse* KL."""

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).first_only(_gap(context, view).square() / 2)

    return Divergence("k2", value, frozenset({SAMPLED}), from_sample=True)


def k3() -> Divergence:
    """exp(-d) - 1 + d: back-propagated on student samples, an unbiased gradient of the *forward* KL."""

    def value(context: Context, view: str) -> Tensor:
        gap_N = _gap(context, view)
        return context.signal(view).first_only((-gap_N).expm1() + gap_N)

    return Divergence("k3", value, frozenset({SAMPLED}), from_sample=True)
