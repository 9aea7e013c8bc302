"""Whether a token is pulled towards the teacher or pushed away from it, by the student's entropy. Axes: `retort.core`.

DASD, arXiv 2605.22263. Everything here needs whole rollouts, so it is taken before the first update.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Advantage, Quantity, Stat
from retort.core.steps import Clock, Rollouts, Steps
from retort.errors import UserError
from retort.quantities.entropy import student_entropy

Scale = Literal["absolute", "std", "none"]
Router = Literal["entropy", "attract", "repel"]
#: Added to divisors; a rollout of constant entropy or without a gap gets no correction.
_EPS = 1e-6


def routed(entropy_N: Tensor, rollouts: Rollouts, quantile: float) -> Tensor:
    r"""The direction of each step, in (-1, 1): :math:`\tanh((\tau - H_t) / (\hat\sigma_H + \epsilon))`, [N].

    Positive (towards the teacher) where the student is surer than :math:`\tau`.

    Args:
        entropy_N: The student's entropy, nats.
        rollouts: The rollouts of these steps.
        quantile: :math:`\tau` is this quantile of the rollout's entropies, interpolated; :math:`\hat\sigma_H` is their
            mean absolute deviation from their mean.
    """
    threshold_R = rollouts.quantile(entropy_N, quantile)
    mean_N = rollouts.mean(entropy_N)[rollouts.number_N]
    deviation_N = rollouts.mean((entropy_N - mean_N).abs())[rollouts.number_N]
    return torch.tanh((threshold_R[rollouts.number_N] - entropy_N) / (deviation_N + _EPS))


def scaled(gap_N: Tensor, rollouts: Rollouts, by: Scale) -> Tensor:
    """Gaps over their typical size in the rollout, [N]; the sign stays.

    Args:
        gap_N: Teacher's log-prob of the sampled token minus the student's, nats.
        rollouts: The rollouts of these steps.
        by: Divisor: the mean of their sizes, their standard deviation (of n), or nothing.
    """
    if by == "none":
        return gap_N
    if by == "absolute":
        size_R = rollouts.mean(gap_N.abs())
    else:
        mean_N = rollouts.mean(gap_N)[rollouts.number_N]
        size_R = rollouts.mean((gap_N - mean_N) ** 2).sqrt()
    return gap_N / (size_R[rollouts.number_N] + _EPS)


def directed(
    outcome: Advantage,
    coef: float,
    *,
    quantile: float,
    scale: Scale = "absolute",
    router: Router = "entropy",
    limit: float = math.inf,
    raw: bool = False,
    name: str = "direction",
) -> Advantage:
    r"""An outcome's advantage plus :math:`\beta\,\omega_t\,\bar\delta_t`; the latter is stored as `<name>.correction`.

    .. math:: \omega_t = \tanh\Big(\frac{\tau - H_t}{\hat\sigma_H + \epsilon}\Big)\,\sigma(|\bar\delta_t| - 1)

    A gap that is infinite counts as 100 nats (`Context.gap_N`).

    Args:
        outcome: The advantage of the outcome.
        coef: beta, the factor.
        quantile: Quantile of tau, see `routed`.
        scale: How the gap becomes :math:`\bar\delta`, see `scaled`.
        router: `entropy`, or 1 (`attract`) or -1 (`repel`) instead of the tanh.
        limit: Largest size of a correction, none by default.
        raw: Whether the product has the gap itself, nats, instead of the scaled one; the gate has the scaled one.
        name: Name of the stored values: `<name>.raw`, `<name>.gap` (scaled), `<name>`, `<name>.correction`, and
            `<name>.largest`, the largest size of a correction in the batch before the limit.

    Raises:
        UserError: The quantile is outside of [0, 1], or the limit is not positive.
    """
    if not 0.0 <= quantile <= 1.0:
        raise UserError(f"directed: a quantile must lie in [0, 1], not {quantile}")
    if not limit > 0:
        raise UserError(f"directed: the limit of a correction must be positive, not {limit}")

    def gap(context: Context, view: str) -> Tensor:
        return context.gap_N(view)

    def raw_gap(gap_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return gap_N.double()

    def scaled_gap(gap_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return scaled(gap_N.double(), steps.rollouts(), scale)

    def omega(entropy_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        gap_N = steps.stored[f"{name}.gap"]
        gate_N = torch.sigmoid(gap_N.abs() - 1.0)
        if router != "entropy":
            return gate_N if router == "attract" else -gate_N
        return routed(entropy_N.double(), steps.rollouts(), quantile) * gate_N

    def free(steps: Steps) -> Tensor:
        return coef * steps.stored[name] * steps.stored[f"{name}.{'raw' if raw else 'gap'}"]

    def correction(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return free(steps).clamp(-limit, limit)

    def largest(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        found_N = free(steps).abs()
        return found_N.max().expand_as(found_N) if len(found_N) else found_N

    stats = (
        Stat(f"{name}.raw", Quantity("gap", gap, frozenset({SAMPLED})), raw_gap),
        Stat(f"{name}.gap", Quantity("gap", gap, frozenset({SAMPLED})), scaled_gap),
        Stat(name, student_entropy(), omega),
        Stat(f"{name}.correction", None, correction),
        Stat(f"{name}.largest", None, largest),
    )

    def value(context: Context, view: str) -> Tensor:
        outcome_N = outcome.value(context, view)
        return outcome_N + context.steps.stored[f"{name}.correction"].to(outcome_N.dtype)

    return Advantage(
        f"{outcome.name} + {coef:g} directed({router})",
        value,
        outcome.needs | {SAMPLED},
        outcome.also,
        (*outcome.stats, *stats),
    )
