"""Entropies and other quantities to gate on. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import ENTROPY, SAMPLED, Need
from retort.core.parts import Quantity


def teacher_entropy() -> Quantity:
    """Entropy of the teacher's whole distribution, nats."""

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).entropy_N

    return Quantity("teacher_entropy", value, frozenset({ENTROPY}))


def student_entropy() -> Quantity:
    """Entropy of the student's whole distribution, nats, detached."""

    def value(context: Context, view: str) -> Tensor:
        return context.student_entropy_N.detach()

    return Quantity("student_entropy", value)


def sampled_reverse_kl() -> Quantity:
    """Log p_old - log p_T of the sampled token, nats: its mean over student samples estimates the reverse KL.

    That of a unit of several tokens is divided evenly among them: the mean is in nats per token of the student.
    """

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return context.signal(view).per_step(old_N - teacher_N)

    return Quantity("reverse_kl", value, frozenset({SAMPLED}))


def teacher_top_mass(k: int) -> Quantity:
    """Probability that the teacher gives to its own top-k."""

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).topk(k)[1].exp().sum(-1)

    return Quantity("teacher_topk_mass", value, frozenset({Need("topk", k)}))
