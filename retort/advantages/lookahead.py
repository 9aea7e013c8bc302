"""A reward for tokens after which the teacher is sure. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.advantages.log_ratio import log_ratio
from retort.core.context import Context
from retort.core.needs import ENTROPY, SAMPLED, Need
from retort.core.parts import Advantage, Quantity
from retort.errors import UserError

#: Added to the deviation of a group of candidates.
EPS = 1e-6


def lookahead_need(k: int, above: float) -> Need:
    """The need for the teacher's confidence after each of the student's `k` most likely ids, at uncertain steps."""
    return Need("lookahead", k, ids_of="student", above=above)


def lookahead_reward(k: int = 8, above: float = 0.2) -> Quantity:
    r"""How sure the teacher is after the sampled token, among the student's k most likely: :math:`(c_y - \bar c) / s`.

    c is the teacher's largest probability one token later; mean and deviation (of the population, plus 1e-6) are over
    the candidates. 0 at steps at which the student's entropy is not above a threshold, where the sampled token is no
    candidate, and where the teacher did not look. (Lookahead group reward, arXiv 2605.30833.)

    Args:
        k: Candidates.
        above: Nats of the student's entropy.
    """
    if k < 2:
        raise UserError(f"lookahead: k must be at least 2, not {k}: one candidate is its own mean")

    def value(context: Context, view: str) -> Tensor:
        ids_NK, sure_NK = context.signal(view).confidence_ahead(k)
        known_NK = ~sure_NK.isnan()
        sure_NK = sure_NK.masked_fill(~known_NK, 0.0).to(context.student_logp_N.dtype)
        count_N = known_NK.sum(-1).clamp_min(1)
        mean_N = sure_NK.sum(-1) / count_N
        apart_NK = torch.where(known_NK, sure_NK - mean_N[:, None], 0.0)
        spread_N = (apart_NK.square().sum(-1) / count_N).sqrt()
        own_NK = known_NK & (ids_NK == context.steps.tokens_N[:, None])
        reward_N = torch.where(own_NK, apart_NK, 0.0).sum(-1) / (spread_N + EPS)
        return torch.where(context.student_entropy_N.detach() > above, reward_N, 0.0)

    return Quantity(
        f"lookahead_reward(top-{k})",
        value,
        frozenset({lookahead_need(k, above)}),
        student_needs=frozenset({ENTROPY}),
    )


def log_ratio_and_lookahead(coef: float, k: int = 8, above: float = 0.2) -> Advantage:
    """The log-ratio plus `coef` times `lookahead_reward`; the log-ratio alone, which looks nowhere, at 0."""
    if coef == 0.0:
        return log_ratio()
    plain, reward = log_ratio(), lookahead_reward(k, above)

    def value(context: Context, view: str) -> Tensor:
        return plain.value(context, view) + coef * reward.value(context, view)

    return Advantage(
        f"log_ratio + {coef:g} {reward.name}",
        value,
        frozenset({SAMPLED}) | reward.needs,
        student_needs=reward.student_needs,
        reads_student=True,
    )


def looked_at(k: int, above: float) -> Quantity:
    """1 where the teacher looked ahead, else 0."""

    def value(context: Context, view: str) -> Tensor:
        return (~context.signal(view).confidence_ahead(k)[1].isnan()).any(-1).to(context.student_logp_N.dtype)

    return Quantity("looked_ahead", value, frozenset({lookahead_need(k, above)}))
