"""Distance of sorted probabilities, which needs no ids in common. Axis letters: see `retort.core`; F as in `Units`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from retort.core.context import Context
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.errors import UserError


def sorted_distance(top_k: int = 1024) -> Divergence:
    r"""ULD's distance of the sorted probabilities of both models: :math:`\sum_i |p_S^{(i)} - p_T^{(i)}|`, in [0, 2].

    At the first position of each unit; which id a probability belongs to plays no part (Universal Logit Distillation,
    arXiv 2402.12030).

    Args:
        top_k: Number of the largest probabilities of each side; the rest of each is one more number.

    Raises:
        UserError: Fewer than 1.
    """
    if top_k < 1:
        raise UserError(f"sorted_distance: top_k must be at least 1, not {top_k}")

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        student = units.student(context.student)
        ids_FK, _ = student.topk(top_k)
        ours_FK, theirs_FK = student.logp_at(ids_FK).exp(), units.teacher.topk(top_k)[1].exp()
        width = max(ours_FK.shape[1], theirs_FK.shape[1])
        ours_FK, theirs_FK = (functional.pad(p_FK, (0, width - p_FK.shape[1])) for p_FK in (ours_FK, theirs_FK))
        rest_F = theirs_FK.sum(-1) - ours_FK.sum(-1)
        return units.at_first((ours_FK - theirs_FK).abs().sum(-1) + rest_F.abs())

    return Divergence(f"sorted_distance(top-{top_k})", value, frozenset({SPANS}))
