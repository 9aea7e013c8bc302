"""Code that reference and kernels share: the statistics of a row, and checks. Axis letters: `retort.core`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.errors import UserError


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Statistics of C rows of logits from one pass over them. All tensors are [C], nats.

    A row whose logits hold NaN or +inf has a NaN log-sum-exp, one whose logits are all -inf has -inf; entropy and
    divergences of such a row are NaN. A caller with an untrusted teacher checks `teacher_lse_C` first.

    Attributes:
        student_lse_C: Log-sum-exp of the student's scaled logits.
        student_entropy_C: The student's entropy.
        teacher_lse_C, teacher_entropy_C: The teacher's; None without a teacher.
        reverse_kl_C: KL(student || teacher); +inf where the teacher rules out an id that the student does not.
        forward_kl_C: KL(teacher || student); +inf where the student rules out an id that the teacher does not.
        jsd_C: Generalised Jensen-Shannon divergence, if requested; always finite.
        mixture_kl_C: KL(student || mixture), which the gradient of the JSD needs; present whenever `jsd_C` is.
    """

    student_lse_C: Tensor
    student_entropy_C: Tensor
    teacher_lse_C: Tensor | None = None
    teacher_entropy_C: Tensor | None = None
    reverse_kl_C: Tensor | None = None
    forward_kl_C: Tensor | None = None
    jsd_C: Tensor | None = None
    mixture_kl_C: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Upstream:
    """Derivatives of the loss by the statistics of a row, and the statistics that its gradient then needs.

    Attributes:
        lse_C, entropy_C, reverse_C, forward_C, jsd_C: Derivatives of the loss by the statistics, [C] or None for 0.
        jsd_weight: Weight of the teacher in the JSD's mixture; None without `jsd_C`.
        ids_CK: Ids whose log-probs the loss reads; an id may occur twice.
        ids_grad_CK: Derivatives of the loss by those log-probs.
    """

    lse_C: Tensor | None = None
    entropy_C: Tensor | None = None
    reverse_C: Tensor | None = None
    forward_C: Tensor | None = None
    jsd_C: Tensor | None = None
    jsd_weight: float | None = None
    ids_CK: Tensor | None = None
    ids_grad_CK: Tensor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a divergence takes part."""
        return self.reverse_C is not None or self.forward_C is not None or self.jsd_C is not None

    @property
    def pull_C(self) -> Tensor | None:
        """The factor of plain p in the gradient: d lse = p, and d log-prob of an id = onehot - p."""
        if self.ids_grad_CK is None:
            return self.lse_C
        given_C = as_compute(self.ids_grad_CK).sum(-1)
        return -given_C if self.lse_C is None else self.lse_C - given_C

    def check(self, student_CV: Tensor, teacher_CV: Tensor | None, statistics: RowStatistics) -> None:
        """Raises `ValueError` where an input of the gradient is missing or has the wrong shape."""
        rows = len(student_CV)
        for name in ("lse_C", "entropy_C", "reverse_C", "forward_C", "jsd_C"):
            values: Tensor | None = getattr(self, name)
            if values is not None and values.shape != (rows,):
                raise ValueError(f"row_gradient: {name} has shape {tuple(values.shape)}, the logits have {rows} rows")
        if self.needs_teacher and (teacher_CV is None or statistics.teacher_lse_C is None):
            raise ValueError("row_gradient: a divergence needs the teacher's logits and statistics made with them")
        if (self.jsd_C is None) != (self.jsd_weight is None):
            raise ValueError("row_gradient: jsd_C and jsd_weight go together")
        if self.jsd_C is not None and statistics.mixture_kl_C is None:
            raise ValueError("row_gradient: jsd_C needs statistics made with jsd_weight")
        ids_CK, ids_grad_CK = self.ids_CK, self.ids_grad_CK
        if (ids_CK is None) != (ids_grad_CK is None):
            raise ValueError("row_gradient: ids_CK and ids_grad_CK go together")
        if ids_CK is None or ids_grad_CK is None:
            return
        if ids_CK.ndim != 2 or len(ids_CK) != rows or ids_CK.shape != ids_grad_CK.shape:
            raise ValueError(
                f"row_gradient: ids_CK {tuple(ids_CK.shape)} and ids_grad_CK {tuple(ids_grad_CK.shape)} must have "
                f"one shape, with {rows} rows"
            )


def check_logits(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    jsd_weight: float | None,
) -> None:
    """Refuses inputs without statistics.

    Raises:
        ValueError: Shapes differ, there is no id, a scale is not positive, or a JSD is requested without a teacher.
        UserError: The weight of the JSD is not strictly between 0 and 1.
    """
    if student_CV.ndim != 2 or student_CV.shape[1] < 1:
        raise ValueError(f"logits must be [C, V] with V at least 1, not {tuple(student_CV.shape)}")
    if teacher_CV is not None and teacher_CV.shape != student_CV.shape:
        raise ValueError(f"the teacher's logits {tuple(teacher_CV.shape)} are not shaped like the student's")
    for name, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if not 0.0 < scale < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {scale}")
    if jsd_weight is not None:
        if teacher_CV is None:
            raise ValueError("a JSD needs the teacher's logits")
        if not 0.0 < jsd_weight < 1.0:
            raise UserError(f"jsd: the teacher's weight must lie strictly between 0 and 1, not {jsd_weight}")


def as_compute(values: Tensor) -> Tensor:
    """Casts to fp32, or to float64 if the input is."""
    return values if values.dtype == torch.float64 else values.float()


def summed_by_id(ids_CK: Tensor, values_CK: Tensor, vocab: int) -> Tensor:
    """For each entry, the sum [C, K] over all entries of its row with its id: any of them may be written last."""
    rows, kept = ids_CK.shape
    if kept < 2:
        return values_CK
    if kept * kept > vocab:  # comparing all pairs would take more memory than a row of logits
        dense_CV = values_CK.new_zeros(rows, vocab)
        return dense_CV.scatter_add_(1, ids_CK, values_CK).gather(1, ids_CK)
    same_CKK = ids_CK[:, :, None] == ids_CK[:, None, :]
    return torch.where(same_CKK, values_CK[:, None, :], 0.0).sum(-1)
