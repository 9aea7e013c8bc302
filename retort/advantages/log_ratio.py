"""Advantages: how much the teacher prefers the sampled token. Axis letters: see `retort.core`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.losses import times
from retort.core.needs import PROBABILITY, SAMPLED
from retort.core.parts import Advantage, Quantity, Stat
from retort.core.schedules import Schedule
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.quantities.contract import BaseMode, weight_below_cliff


def log_ratio() -> Advantage:
    r"""The sampled log-ratio :math:`\log p_T(y_t) - \log p_{old}(y_t)`, nats; its mean is minus the reverse KL.

    It is taken against the student before the first update on the batch, so it stays fixed over several updates. It is
    minus infinity where the teacher rules the token out; so is the loss then, and the run stops and names the token.

    Against a teacher with another tokenizer it is that of the step's whole unit, at every step of it. Its mean is minus
    the reverse KL of the text in units: exact for units that are given. Approximate is that each text counts under the
    one tokenization that was generated, where a model may write the same bytes in other tokens, too.
    """

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return teacher_N - old_N

    return Advantage("log_ratio", value, frozenset({SAMPLED}))


def return_to_go(discount: float = 0.0, coef: float = 1.0) -> Advantage:
    r"""The log-ratio plus those that follow in its completion: :math:`\lambda \sum_{u \ge t} \gamma^{u-t} A_u`, nats.

    A is `log_ratio`. The sum runs over the tokens of the rollout that count, so it is taken over the whole batch. A
    unit of several tokens enters it once, at its first token.

    Args:
        discount: gamma, from 0 (the log-ratio itself) to 1 (all that follows).
        coef: lambda, dimensionless.
    """
    if not 0.0 <= discount <= 1.0:
        raise UserError(f"return_to_go: discount must lie in [0, 1], not {discount}")
    inner = log_ratio()
    if discount == 0.0:

        def plain(context: Context, view: str) -> Tensor:
            return times(coef, inner.value(context, view))

        return Advantage(f"log_ratio * {coef:g}", plain, inner.needs)

    def finish(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        rollouts, position_N = steps.rollouts(), steps.position_N
        # The sum ends with a completion; all completions are summed at once, from the back.
        values_RA = values_N.new_zeros(len(rollouts.steps_R), int(rollouts.steps_R.max()), dtype=torch.float64)
        values_RA[rollouts.number_N, position_N] = values_N.double()
        for position in reversed(range(values_RA.shape[1] - 1)):
            values_RA[:, position] += discount * values_RA[:, position + 1]
        return values_RA[rollouts.number_N, position_N]

    def once(context: Context, view: str) -> Tensor:
        return context.signal(view).first_only(inner.value(context, view))

    stat = Stat(f"return_to_go({discount:g})", Quantity("log_ratio", once, inner.needs), finish)

    def value(context: Context, view: str) -> Tensor:
        return times(coef, context.steps.stored[stat.name].to(context.student_logp_N.dtype))

    return Advantage(f"{stat.name} * {coef:g}", value, inner.needs, stats=(stat,))


def extrapolated_log_ratio(
    reward_weight: float | Schedule, *, base: str = "base", stats: tuple[Stat, ...] = ()
) -> Advantage:
    r"""A log-ratio to the student with a free weight on the teacher's implicit reward, nats.

    .. math:: A_t = \lambda\,[\log p_T(y_t) - \log p_B(y_t)] - [\log p_{old}(y_t) - \log p_B(y_t)]

    G-OPD, arXiv 2602.12125. Evaluated as the plain log-ratio plus :math:`(\lambda - 1)` times
    :math:`\log p_T - \log p_B`, which is the same number and exactly the plain log-ratio at :math:`\lambda = 1`.

    Args:
        reward_weight: lambda, dimensionless; a schedule may move it with the run.
        base: The view of the base model, :math:`p_B`.
        stats: Further statistics to compute.
    """

    def value(context: Context, view: str) -> Tensor:
        return _extrapolated(context, view, base, context.clock.at(reward_weight))

    name = "a schedule" if callable(reward_weight) else f"{reward_weight:g}"
    return Advantage(
        f"extrapolated_log_ratio({name})", value, frozenset({SAMPLED}), {base: frozenset({SAMPLED})}, stats
    )


def _extrapolated(context: Context, view: str, base: str, reward_weight: float) -> Tensor:
    teacher_logp_N, old_logp_N = context.decided_logps(view)
    plain_N = teacher_logp_N - old_logp_N
    if reward_weight == 1.0:  # the base does not matter, also where it rules a token out
        return plain_N
    base_logp_N = context.decided_logps(view, of=base)[0]
    if reward_weight == 0.0:  # the teacher does not matter
        return base_logp_N - old_logp_N
    # A token that the teacher rules out stays ruled out: infinity minus infinity would be NaN.
    preferred_N = torch.where(teacher_logp_N == -math.inf, 0.0, teacher_logp_N - base_logp_N)
    return plain_N + (reward_weight - 1.0) * preferred_N


def capped_log_ratio(
    reward_weight: float, cap: float, margin: float, base_mode: BaseMode, measured: tuple[Stat, ...]
) -> Advantage:
    """`extrapolated_log_ratio` with the weight kept `margin` below the cliff predicted for each batch.

    Args:
        reward_weight: The weight wanted, dimensionless.
        cap: Largest importance ratio, which the prediction depends on.
        margin: Distance below `retort.quantities.threshold_weight`.
        base_mode: The same as for `measured`.
        measured: The statistics of `retort.quantities.masses`.
    """

    def value(context: Context, view: str) -> Tensor:
        return _extrapolated(context, view, "base", weight_below_cliff(context, reward_weight, cap, margin, base_mode))

    needs = frozenset({SAMPLED})
    return Advantage(f"held_log_ratio({reward_weight:g})", value, needs, {"base": needs}, measured)


def power_difference(power: float) -> Advantage:
    r"""PowerOPD's :math:`p_T(y_t)^\alpha - p_{old}(y_t)^\alpha`, dimensionless, in [-1, 1] (arXiv 2606.17199).

    It has the sign of the log-ratio and, divided by alpha, tends to it as alpha -> 0. It is not the gradient of a KL.
    Of a unit of several tokens (`log_ratio`) it takes the probabilities of the whole unit.

    Args:
        power: alpha > 0. A large one leaves only tokens of which one side is nearly certain.
    """
    if power <= 0:
        raise UserError(f"power_difference: power must be positive, not {power}")

    def value(context: Context, view: str) -> Tensor:
        teacher_N, old_N = context.decided_logps(view)
        return (power * teacher_N).exp() - (power * old_N).exp()

    return Advantage(
        f"power_difference({power:g})", value, frozenset({SAMPLED}), student_needs=frozenset({PROBABILITY})
    )


def clipped_log_ratio(low: float, high: float = math.inf) -> Advantage:
    """The log-ratio, nats, clipped to [`low`, `high`]."""
    if not low < high:
        raise UserError(f"clipped_log_ratio: low ({low}) must lie below high ({high})")
    inner = log_ratio()

    def value(context: Context, view: str) -> Tensor:
        return inner.value(context, view).clamp(low, high)

    return Advantage(f"clipped_log_ratio({low:g}, {high:g})", value, inner.needs)


def tanh_log_ratio(scale: float = 5.0) -> Advantage:
    """The tanh of the log-ratio over `scale` (nats), in [-1, 1]."""
    if scale <= 0:
        raise UserError(f"tanh_log_ratio: scale must be positive, not {scale}")
    inner = log_ratio()

    def value(context: Context, view: str) -> Tensor:
        return torch.tanh(inner.value(context, view) / scale)

    return Advantage(f"tanh_log_ratio({scale:g})", value, inner.needs)


def lower_clip(share: float) -> float:
    r"""REOPOLD's lower bound on the log-ratio, nats: :math:`\ln\lambda / (1 - \lambda)`, 0 < lambda < 1."""
    if not 0.0 < share < 1.0:
        raise UserError(f"lower_clip: lambda must lie strictly between 0 and 1, not {share}")
    return math.log(share) / (1.0 - share)
