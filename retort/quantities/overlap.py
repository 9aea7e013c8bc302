"""Whether a teacher can teach a student: what their top-k have in common. Axis letters: see `retort.core`.

These are the measures of "Rethinking On-Policy Distillation of LLMs" (arXiv 2604.13016), in the paper's form. It
differs from the released code, which averages rewards over all pairs, and weighs with probabilities renormalised on
the student's k ids instead of on the shared ids.

All of them read the same two top-k lists, which are computed once per block of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import ENTROPY, Need
from retort.core.parts import Quantity
from retort.errors import UserError


@dataclass(frozen=True, eq=False)
class Overlap:
    """The student's top-k ids, and which of them are the teacher's, too.

    Attributes:
        student_logp_CK: Log-probs of the student's k ids under the student, nats, detached.
        teacher_logp_CK: The same ids under the teacher where they are in its top-k; minus infinity elsewhere.
        shared_CK: True where the id is in both.
    """

    student_logp_CK: Tensor
    teacher_logp_CK: Tensor
    shared_CK: Tensor

    @property
    def count_C(self) -> Tensor:
        """Number of shared ids, [C]."""
        return self.shared_CK.sum(-1)


def overlap(context: Context, view: str, k: int) -> Overlap:
    """Compares both sides' top-k, once per block for all quantities that read it."""

    def make() -> Overlap:
        ids_CK, student_logp_CK = context.student.topk(k)
        other_CK, teacher_logp_CK = context.signal(view).topk(k)
        same_CKK = ids_CK[:, :, None] == other_CK[:, None, :]
        found_CK = teacher_logp_CK[:, None, :].masked_fill(~same_CKK, -torch.inf).amax(-1)
        return Overlap(student_logp_CK.detach(), found_CK, same_CKK.any(-1))

    return context.once(("overlap", view, k), make)


def overlap_ratio(k: int = 16) -> Quantity:
    """Share of the student's top-k that is in the teacher's top-k, between 0 and 1."""

    def value(context: Context, view: str) -> Tensor:
        found = overlap(context, view, k)
        return found.count_C / found.shared_CK.shape[-1]

    return _of("overlap_ratio", k, value)


def overlap_advantage(k: int = 16) -> Quantity:
    r"""How much the teacher would shift the student among the ids they share, nats; 0 is agreement, never above it.

    .. math:: \frac{1}{|O|} \sum_{v \in O} \bar p_S(v) (\log \bar p_T(v) - \log \bar p_S(v))

    with both renormalised on O. NaN (left out of means) where nothing is shared.
    """

    def value(context: Context, view: str) -> Tensor:
        found = overlap(context, view, k)
        ours_CK = found.student_logp_CK.masked_fill(~found.shared_CK, -torch.inf)
        lone_C = found.count_C == 0
        ours_CK = ours_CK.masked_fill(lone_C[:, None], 0.0).log_softmax(-1)
        theirs_CK = found.teacher_logp_CK.masked_fill(lone_C[:, None], 0.0).log_softmax(-1)
        term_CK = torch.where(found.shared_CK, ours_CK.exp() * (theirs_CK - ours_CK), 0.0)
        return (term_CK.nan_to_num(nan=0.0).sum(-1) / found.count_C).masked_fill(lone_C, torch.nan)

    return _of("overlap_advantage", k, value)


def overlap_mass(k: int = 16) -> Quantity:
    """Probability that the student gives to the ids in both top-k."""

    def value(context: Context, view: str) -> Tensor:
        found = overlap(context, view, k)
        return found.student_logp_CK.exp().masked_fill(~found.shared_CK, 0.0).sum(-1)

    return _of("overlap_mass", k, value)


def overlap_teacher_mass(k: int = 16) -> Quantity:
    """Probability that the teacher gives to the ids in both top-k."""

    def value(context: Context, view: str) -> Tensor:
        return overlap(context, view, k).teacher_logp_CK.exp().sum(-1)

    return _of("overlap_teacher_mass", k, value)


def entropy_gap() -> Quantity:
    """Size of the difference between the two entropies, nats."""

    def value(context: Context, view: str) -> Tensor:
        return (context.signal(view).entropy_N - context.student_entropy_N.detach()).abs()

    return Quantity("entropy_gap", value, frozenset({ENTROPY}))


def _of(name: str, k: int, value: Callable[[Context, str], Tensor]) -> Quantity:
    if k < 1:
        raise UserError(f"{name}: k must be at least 1, not {k}")
    return Quantity(name, value, frozenset({Need("topk", k)}))
