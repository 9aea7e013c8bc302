"""What a teacher has over its own base model, taken where it also has it over the student. Axes: `retort.core`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import RULED_OUT, Context
from retort.core.needs import SAMPLED, logp_at
from retort.core.parts import Advantage, Quantity
from retort.divergences.support import student_topk
from retort.errors import UserError


def gated_delta(base: str, top_k: int = 1024, scale: float = 0.1) -> Advantage:
    r"""The teacher's log-ratio to its base model, centred, where it has the sign of that to the student; else 0, nats.

    .. math:: A^\Delta_t\,[A^\Delta_t A^S_t > 0], \quad A_t = R_t - \sum_{v \in TopK(p_S)} p_S(v)\,R(v)

    with :math:`R^\Delta = \log p_T - \log p_B` and :math:`R^S = \log p_T - \log p_S`. The centre is the mean over the
    student's ids, as a baseline; it is not divided by their mass. An id that teacher or base rules out counts for
    `RULED_OUT` nats there. (OPD2, arXiv 2607.15161.)

    Args:
        base: The view of the teacher's base model.
        top_k: Ids of the student in the centre; at or above the vocabulary it is exact.
        scale: A factor.
    """
    if top_k < 1:
        raise UserError(f"gated_delta: top_k must be at least 1, not {top_k}")

    def value(context: Context, view: str) -> Tensor:
        delta_N, own_N = deltas(context, view, base, top_k)
        # An infinite advantage times 0 is NaN, and no sign.
        return torch.where(delta_N * own_N > 0, scale * delta_N, 0.0)

    needs = frozenset({SAMPLED, logp_at(top_k)})
    return Advantage(f"gated_delta(top-{top_k})", value, needs, {base: needs}, reads_student=True)


def delta_kept(base: str, top_k: int = 1024) -> Quantity:
    """1 where `gated_delta` is not 0, else 0."""

    def value(context: Context, view: str) -> Tensor:
        delta_N, own_N = deltas(context, view, base, top_k)
        return (delta_N * own_N > 0).to(delta_N.dtype)

    needs = frozenset({SAMPLED, logp_at(top_k)})
    return Quantity(f"delta_kept(top-{top_k})", value, needs, {base: needs})


def deltas(context: Context, view: str, base: str, top_k: int) -> tuple[Tensor, Tensor]:
    """The two centred log-ratios of the sampled token, to the base and to the student, nats, [N] each."""

    def make() -> tuple[Tensor, Tensor]:
        ids_NK, student_NK = student_topk(context, view, top_k)
        teacher_NK, base_NK = context.signal(view).logp_at(ids_NK), context.signal(base).logp_at(ids_NK)
        teacher_N, old_N = context.decided_logps(view)
        base_N = context.decided_logps(view, of=base)[0]
        p_NK = student_NK.exp()

        def centred(reward_N: Tensor, reward_NK: Tensor) -> Tensor:
            finite_NK = reward_NK.nan_to_num(0.0, posinf=RULED_OUT, neginf=-RULED_OUT)
            return reward_N - (p_NK * finite_NK).sum(-1)

        # What the teacher rules out stays ruled out, whatever its base says.
        delta_N = torch.where(teacher_N == -math.inf, -math.inf, teacher_N - base_N)
        return centred(delta_N, teacher_NK - base_NK), centred(teacher_N - old_N, teacher_NK - student_NK)

    return context.once(("deltas", view, base, top_k), make)
