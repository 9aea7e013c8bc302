"""Acceptance of the student's tokens by a teacher, as in speculative decoding. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SAMPLED
from retort.core.parts import Quantity, Stat, Weight
from retort.core.random_streams import uniforms
from retort.core.steps import Clock, Steps
from retort.errors import UserError

#: Name of the stored random numbers.
DRAWS = "acceptance"


def drawn(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
    """A uniform number in [0, 1) for each step, [N], float64: of its batch, its rollout and its place there.

    They are keyed by the run's seed and not advanced, so they do not depend on how a batch is cut, and a resumed run
    draws the same.
    """
    rollouts, position_N = steps.rollouts(), steps.position_N.cpu()
    number_N = rollouts.number_N.cpu()
    count = len(rollouts.steps_R)
    # Drawn by the rollout's own index, so that a masked rollout does not change the draws of the others.
    index_R = torch.zeros(count, dtype=torch.long).index_copy_(0, number_N, steps.rollout_N.cpu())
    longest_R = torch.zeros(count, dtype=torch.long).scatter_reduce_(0, number_N, position_N + 1, "amax")
    own = [
        uniforms(clock.seed, "acceptance", clock.step, int(index), count=int(longest))
        for index, longest in zip(index_R, longest_R, strict=True)
    ]
    starts_R = longest_R.cumsum(0) - longest_R
    found_N = torch.cat([torch.zeros(0, dtype=torch.float64), *own])[starts_R[number_N] + position_N]
    return found_N.to(steps.rollout_N.device)


def acceptance_probability(leniency: float = 1.0) -> Quantity:
    r"""Probability with which speculative decoding would accept the token: :math:`\min(c\,p_T(y) / p_{old}(y), 1)`.

    At c = 1 its mean over the student's tokens is :math:`\sum_v \min(p_S, p_T)`, one minus the total variation.

    Args:
        leniency: c.
    """

    def value(context: Context, view: str) -> Tensor:
        return _probability(context, view, leniency)

    return Quantity(f"acceptance_probability({leniency:g})", value, frozenset({SAMPLED}), uses_old_logp=True)


def accepted(leniency: float = 1.0, *, refused: bool = False) -> Weight:
    """1 where the teacher accepts the token by a draw, else 0; against the student before the first update.

    Args:
        leniency: As in `acceptance_probability`; 0 accepts nothing, infinity everything that the teacher can write.
        refused: The opposite: 1 where it does not accept.

    Raises:
        UserError: The leniency is negative.
    """
    if not leniency >= 0:
        raise UserError(f"leniency must not be negative, it is {leniency:g}")

    def value(context: Context, view: str) -> Tensor:
        probability_N = _probability(context, view, leniency)
        below_N = context.steps.stored[DRAWS].to(probability_N.device) < probability_N.double()
        return (~below_N if refused else below_N).to(probability_N.dtype)

    name = f"{'not ' if refused else ''}accepted({leniency:g})"
    return Weight(name, value, frozenset({SAMPLED}), stats=(Stat(DRAWS, None, drawn),), uses_old_logp=True)


def _probability(context: Context, view: str, leniency: float) -> Tensor:
    teacher_N, old_N = context.decided_logps(view)
    ratio_N = leniency * (teacher_N - old_N).detach().exp()
    return ratio_N.nan_to_num(0.0, posinf=1.0).clamp_max(1.0)  # infinitely lenient of an impossible token: refused
