"""Weights of several teachers: fixed ones, or by how sure each says to be. Axis letters: see `retort.core`.

MAD-OPD, arXiv 2605.01347.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Stat, Weight
from retort.core.steps import Clock, Steps
from retort.errors import UserError

#: Name of the stored value that is 1 at steps about which some teacher says something.
SOMEBODY = "debate.somebody"


def debate_weights(confidences: Sequence[float | None], temperature: float = 1.0) -> list[float]:
    r"""Weights of teachers by how sure each says to be: :math:`a_k \propto \exp(c_k / (100 \tau))`.

    Only differences count, and little: of two teachers the surer one has at most 0.731 at a temperature of 1.

    Args:
        confidences: c, 0 to 100, one for each teacher; None where one said nothing, and then all weights are equal.
        temperature: tau, dimensionless; a smaller one follows the surest more.

    Returns:
        The weights a, which add up to 1.

    Raises:
        UserError: There is no teacher, a confidence is not finite, or the temperature is not positive.

    Example:
        >>> from retort.teachers import debate_weights
        >>> [round(weight, 4) for weight in debate_weights([95, 90])]
        [0.5125, 0.4875]
        >>> debate_weights([95, None])
        [0.5, 0.5]
    """
    if not confidences:
        raise UserError("debate_weights: there is no confidence; give one for each teacher")
    if any(own is not None and not math.isfinite(own) for own in confidences):
        raise UserError("debate_weights: a confidence is not finite; give None where a teacher says nothing")
    values = [math.nan if own is None else float(own) for own in confidences]
    return [float(own) for own in confidence_weights(torch.tensor([values], dtype=torch.float64), temperature)[0]]


def confidence_weights(confidence_NK: Tensor, temperature: float) -> Tensor:
    """The same at N steps, [N, K]; equal weights in a row with a NaN.

    Args:
        confidence_NK: 0 to 100, NaN for nothing.
        temperature: As in `debate_weights`.

    Raises:
        UserError: The temperature is not positive.
    """
    if not temperature > 0:
        raise UserError(f"the temperature of debate weights must be positive, not {temperature}")
    whole_N1 = confidence_NK.isfinite().all(-1, keepdim=True)
    scaled_NK = torch.where(whole_N1, confidence_NK / (100.0 * temperature), 0.0)
    return scaled_NK.softmax(-1)


def teacher_share(
    view: str, views: Sequence[str], *, fixed: Sequence[float] | None = None, temperature: float | None = None
) -> Weight:
    """The weight of one of several teachers at each step; those that have no context at a step leave theirs to others.

    It stores `debate.<view>`, and `debate.somebody`: 1 at steps about which some teacher says something.

    Args:
        view: The view whose weight this is.
        views: The views of all K teachers, in the order of their confidences.
        fixed: Weights of the teachers, which are divided by their sum; None for equal ones.
        temperature: The weights are of confidences (`debate_weights`), at this temperature; None: they are `fixed`.

    Raises:
        UserError: Weights that are not one for each teacher, or a weight or temperature that is not positive.
    """
    prior = [1.0] * len(views) if fixed is None else [float(own) for own in fixed]
    if len(prior) != len(views) or not all(own > 0 and math.isfinite(own) for own in prior):
        raise UserError(
            f"weights must be {len(views)} positive numbers, one for each teacher, not {list(fixed or ())}; a teacher "
            "without weight is left out with a smaller `teachers`"
        )
    if temperature is not None and not temperature > 0:
        raise UserError(f"weights_temperature must be positive, not {temperature}")
    place = list(views).index(view)

    def said(steps: Steps) -> Tensor:
        return torch.stack([steps.stored[f"context.{other}"] for other in views], -1).double()

    def share(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        said_NK = said(steps)
        raw_NK = torch.tensor(prior, dtype=torch.float64, device=said_NK.device).expand_as(said_NK)
        if temperature is not None:
            confidence_NK = _of_teachers(steps, len(views))
            raw_NK = confidence_weights(confidence_NK.to(said_NK.device), temperature)
        kept_NK = raw_NK * said_NK
        total_N = kept_NK.sum(-1)
        return kept_NK[:, place] / torch.where(total_N > 0, total_N, 1.0)

    def somebody(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        return said(steps).amax(-1)

    stats = (
        Stat(f"debate.{view}", None, share, contexts=tuple(views)),
        Stat(SOMEBODY, None, somebody, contexts=tuple(views)),
    )

    def value(context: Context, against: str) -> Tensor:
        return context.steps.stored[f"debate.{view}"].to(context.student_logp_N.dtype)

    return Weight(f"share of {view} among {len(views)}", value, stats=stats)


def _of_teachers(steps: Steps, count: int) -> Tensor:
    """What K teachers said of themselves, [N, K]; NaN where nothing is known.

    Raises:
        UserError: There are confidences of another number of teachers.
    """
    found = steps.confidence_NK
    if found is None:
        return torch.full((len(steps), count), math.nan, dtype=torch.float64)
    if found.shape[1] != count:
        raise UserError(f"confidences are of {found.shape[1]} teachers, and the method has {count}")
    return found
