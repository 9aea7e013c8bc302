"""Divergence on the positions at which two tokenizers agree. Axis letters: see `retort.core`; F, S as in `Units`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.divergences.units import on_student_top, shared_scores
from retort.errors import UserError


def strict_shared_kl(top_k: int | None = 16) -> Divergence:
    r"""Reverse KL on shared ids at units of one shared token on both sides, nats; 0 at all other units.

    Both distributions are restricted to the shared ids and renormalised (arXiv 2610.08448).

    Args:
        top_k: Take only the student's k most likely of them, detached; None, or more than there are: all. On 1 id the
            value is 0 everywhere.

    Raises:
        UserError: Fewer than 1 id.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"strict_shared_kl: top_k must be at least 1, or none for all shared ids, not {top_k}")

    def value(context: Context, view: str) -> Tensor:
        scores = shared_scores(context, view)
        index_G = scores.units.matched_F.nonzero().squeeze(-1)
        found_G = on_student_top(scores, top_k, index_G)
        return found_G.new_zeros(len(context.steps)).index_copy(0, scores.units.first_F[index_G], found_G)

    return Divergence(
        "strict_shared_kl" if top_k is None else f"strict_shared_kl(top-{top_k})", value, frozenset({SPANS})
    )
