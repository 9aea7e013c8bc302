"""The log-ratio, weaker where it would take entropy from the student. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import ENTROPY, PROBABILITY, SAMPLED
from retort.core.parts import Advantage, Quantity
from retort.core.policy import Policy
from retort.errors import SignalError, UserError


def entropy_slope(policy: Policy, logp_N: Tensor) -> Tensor:
    r"""How the entropy of a softmax changes with a step along the gradient of log p(y) in its logits, nats, [N].

    .. math:: D = -p_y (\log p_y + H) + \sum_v p_v^2 (\log p_v + H)

    Args:
        policy: The distribution p.
        logp_N: Its log-prob of y, nats.
    """
    if not isinstance(policy, Distribution):
        raise SignalError("the influence on the entropy is that of a distribution over tokens")
    entropy_N = policy.entropy().detach()
    p_CV = policy.p_CV
    # An impossible id has a square of 0, and a log of minus infinity.
    term_CV = p_CV.square() * (policy.logp_CV + entropy_N[:, None])
    every_N = policy.shard.sum(torch.where(p_CV > 0, term_CV, 0.0).sum(-1))
    return every_N - logp_N.exp() * (logp_N + entropy_N)


def entropy_influence() -> Quantity:
    """First-order change of the student's entropy by the log-ratio of the token, per unit of step, nats."""

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return (teacher_N - old_N) * _slope(context)

    return Quantity("entropy_influence", value, frozenset({SAMPLED}), student_needs=frozenset({ENTROPY}))


def influence_directed(power: float = 1.0) -> Advantage:
    r"""The log-ratio A, times :math:`w^\kappa` where its first-order influence on the student's entropy is negative.

    .. math:: w = \frac{|p_T(y) - p_S(y)|}{p_T(y) + p_S(y)}

    Influence-directed OPD, arXiv 2608.29846. w is near 0 where the two nearly agree, and 1 where one rules out y.

    Args:
        power: kappa; 0 leaves the log-ratio as it is.
    """
    if power < 0:
        raise UserError(f"power must not be negative, it is {power:g}")

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        ratio_N = teacher_N - old_N
        # |a - b| / (a + b) of two probabilities is the hyperbolic tangent of half of their log-ratio.
        weak_N = torch.tanh(ratio_N.abs() / 2) ** power
        return torch.where(ratio_N * _slope(context) < 0, weak_N * ratio_N, ratio_N)

    return Advantage(
        f"influence_directed({power:g})",
        value,
        frozenset({SAMPLED}),
        student_needs=frozenset({ENTROPY, PROBABILITY}),
        reads_student=True,
    )


def _slope(context: Context) -> Tensor:
    return context.once(
        "entropy_slope", lambda: entropy_slope(context.student, context.student_logp_N.detach()).detach()
    )
