"""Entropies and other quantities to gate on. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import ENTROPY, SAMPLED, Need
from retort.core.parts import Quantity


def teacher_entropy(*, or_bound: bool = False) -> Quantity:
    """Entropy of the teacher's whole distribution, nats.

    Args:
        or_bound: Take a lower bound, from a top-k and one bucket for the rest, of a teacher that gives no more.
    """

    def value(context: Context, view: str) -> Tensor:
        rows = context.signal(view)
        return rows.entropy_bound_N if or_bound else rows.entropy_N

    return Quantity("teacher_entropy", value, frozenset({replace(ENTROPY, or_bound=or_bound)}))


def teacher_entropy_bound() -> Quantity:
    """The lower bound of a teacher's entropy, nats, where it gives no more than that; to watch."""

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).entropy_bound_N

    return Quantity("teacher_entropy_bound", value, frozenset({Need("entropy_bound")}))


def student_entropy() -> Quantity:
    """Entropy of the student's whole distribution, nats, detached."""

    def value(context: Context, view: str) -> Tensor:
        return context.student_entropy_N.detach()

    return Quantity("student_entropy", value, student_needs=frozenset({ENTROPY}))


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
