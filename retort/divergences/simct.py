"""SimCT's divergence between models with two tokenizers. Axis letters: see `retort.core`; F, S as in `Units`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.core.signals import Units
from retort.divergences.kl import kl_values
from retort.divergences.units import SharedScores, renormalised, shared_scores
from retort.errors import SignalError, UserError

Score = Literal["log_prob", "raw_logit"]


def simct(score: Score = "log_prob", gh_threshold: float | None = None) -> Divergence:
    r"""Reverse KL over the shared ids and the unit that was written, nats: :math:`D_{KL}(Q_S \Vert Q_T)`.

    .. math:: Q_M = \mathrm{softmax}\big(\{\log p_M(u)\}_{u \in V_S \cap V_T} \cup
              \{\tfrac{1}{k} \textstyle\sum_j \log p_M(v_j)\}\big)

    at the first position of each unit, where :math:`v_1 \ldots v_k` are the model's own tokens of the unit (SimCT,
    arXiv 2605.07711). A unit that is one shared id on both sides has no further dimension: with one tokenizer the value
    is the reverse KL over the whole vocabulary. The gradient reaches every token of the unit.

    The normalised log-prob of a unit is a score and no probability, and its first token may be a shared id as well, so
    its mass can count twice; both are the paper's.

    Args:
        score: The unit's score: the mean log-prob (the paper), or the mean raw logit (the released code). A constant
            added to the logits of a later token changes the second, and not the first.
        gh_threshold: Leave out units where the teacher's mass :math:`\min(1, m + e^{\text{mean log-prob}})` is below
            one over this number, m being its probability of all shared ids (a later version of the code has 2); None
            keeps all. A heuristic: the exponential is no probability of the unit.

    Raises:
        UserError: The threshold is below 1.
    """
    if gh_threshold is not None and not gh_threshold >= 1:
        raise UserError(f"simct: gh_threshold must be at least 1, or none for no mask; it is {gh_threshold}")

    def value(context: Context, view: str) -> Tensor:
        scores = shared_scores(context, view)
        units, student_FU, teacher_FU = scores.units, scores.student_FS, scores.teacher_FS
        theirs_F = units.logp_F / units.theirs_F
        if not bool(units.matched_F.all()):
            ours_F = units.sum(context.student_logp_N) / units.own_F
            raw_F = theirs_F
            if score == "raw_logit":
                ours_F, raw_F = _raw(context, scores)
            student_FU, teacher_FU = (
                torch.cat([known_FS, span_F.masked_fill(units.matched_F, -math.inf)[:, None]], 1)
                for known_FS, span_F in ((student_FU, ours_F), (teacher_FU, raw_F))
            )
        value_F = kl_values(renormalised(student_FU), renormalised(teacher_FU))
        if gh_threshold is not None:
            value_F = torch.where(_kept(units, scores.teacher_FS, theirs_F, gh_threshold), value_F, 0.0)
        return units.at_first(value_F)

    name = "simct" if score == "log_prob" else "simct(raw_logit)"
    return Divergence(name, value, frozenset({SPANS}))


def _raw(context: Context, scores: SharedScores) -> tuple[Tensor, Tensor]:
    """Mean raw logits of both sides' tokens of each unit, [F], less the log-sum-exp at its first position.

    The other scores are log-probs, which are the raw logits less the same number, so the softmax is that of raw logits.
    """
    units, student = scores.units, context.student
    if units.raw_F is None:
        raise SignalError(f"{units.source}: its signal has no raw logits of the teacher's tokens (score=raw_logit)")
    if student.shard.spread:
        raise SignalError("simct with score=raw_logit needs the student's whole vocabulary on one rank")
    normaliser_C = student.logits_CV.logsumexp(-1)
    raw_F = units.sum(context.student_logp_N + normaliser_C) / units.own_F
    return raw_F - normaliser_C[units.first_F], units.raw_F / units.theirs_F - units.teacher.normaliser_C


def _kept(units: Units, teacher_FS: Tensor, mean_logp_F: Tensor, threshold: float) -> Tensor:
    """The units whose teacher mass is at least one over the threshold, bool [F]."""
    mass_F = teacher_FS.exp().sum(-1) + mean_logp_F.exp().masked_fill(units.matched_F, 0.0)
    return mass_F.clamp_max(1.0) >= 1.0 / threshold
