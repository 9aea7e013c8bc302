"""Gates, made by comparing a quantity with a threshold, and products of weights. Axis letters: see `retort.core`.

EOPD's gate is `above(teacher_entropy(), ...)`.
"""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Quantity, Weight


def above(quantity: Quantity, threshold: float) -> Weight:
    """A hard gate: 1 where the quantity is strictly greater than the threshold, else 0."""

    def value(context: Context, view: str) -> Tensor:
        value_N = quantity.value(context, view)
        return (value_N > threshold).to(value_N.dtype)

    return Weight(
        f"{quantity.name} > {threshold:g}",
        value,
        quantity.needs,
        quantity.also,
        quantity.stats,
        uses_old_logp=quantity.uses_old_logp,
        student_needs=quantity.student_needs,
    )


def below(quantity: Quantity, threshold: float) -> Weight:
    """A hard gate: 1 where the quantity is strictly less than the threshold, else 0."""

    def value(context: Context, view: str) -> Tensor:
        value_N = quantity.value(context, view)
        return (value_N < threshold).to(value_N.dtype)

    return Weight(
        f"{quantity.name} < {threshold:g}",
        value,
        quantity.needs,
        quantity.also,
        quantity.stats,
        uses_old_logp=quantity.uses_old_logp,
        student_needs=quantity.student_needs,
    )


def both(one: Weight, other: Weight) -> Weight:
    """The product of two weights."""

    def value(context: Context, view: str) -> Tensor:
        return one.value(context, view) * other.value(context, view)

    also = {view: one.needs_of(view, "") | other.needs_of(view, "") for view in {*one.also, *other.also}}
    return Weight(
        f"{one.name} * {other.name}",
        value,
        one.needs | other.needs,
        also,
        one.stats + other.stats,
        uses_old_logp=one.uses_old_logp or other.uses_old_logp,
        student_needs=one.student_needs | other.student_needs,
        corrects_engine=one.corrects_engine or other.corrects_engine,
    )
