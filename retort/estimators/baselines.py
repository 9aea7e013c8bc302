"""Baselines of the score function, in closed form. Axis letters: see `retort.core`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import POLICY, logp_at
from retort.core.parts import Baseline
from retort.divergences.kl import kl_values
from retort.divergences.support import student_topk
from retort.divergences.units import on_student_top, shared_scores
from retort.errors import UserError


def reverse_kl_value(top_k: int | None = None) -> Baseline:
    r"""The value of a step when the reward is the log-ratio: :math:`V = -D_{KL}(p_S \Vert p_T)`, nats.

    From vOPD, arXiv 2605.07865.

    Args:
        top_k: None for the whole vocabulary (Eqs. 9-10). Otherwise both sides are renormalised on the student's `top_k`
            most likely ids (Eqs. 14-15): still unbiased, because it does not depend on the sampled token. The teacher
            then scores those ids only.

    Against a teacher with another tokenizer, both sides are renormalised on the shared ids at the beginning of each
    unit (the student's `top_k` of them). A longer unit's own score is missing there: the baseline then takes off less
    variance, and adds no bias, because it does not depend on what is written.

    Raises:
        UserError: Fewer than 1 id. (On 1 id, renormalised, the value is 0 everywhere.)
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"reverse_kl_value: top_k must be at least 1, or none for the whole vocabulary, not {top_k}")

    def value(context: Context, view: str) -> Tensor:
        teacher = context.signal(view)
        if teacher.by_unit:
            scores = shared_scores(context, view)
            return -scores.units.at_first(on_student_top(scores, top_k).detach())
        if top_k is None:
            return -context.policy.reverse_kl(teacher.policy).detach()
        ids_NK, student_logp_NK = student_topk(context, view, top_k)
        return -kl_values(student_logp_NK.log_softmax(-1), teacher.logp_at(ids_NK).log_softmax(-1))

    name = "reverse_kl_value" if top_k is None else f"reverse_kl_value(top-{top_k})"
    return Baseline(name, value, frozenset({replace(POLICY if top_k is None else logp_at(top_k), or_spans=True)}))
