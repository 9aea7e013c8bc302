"""A statistic that is stored with the batch, as a quantity. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Quantity


def stored_quantity(name: str) -> Quantity:
    """The statistic that a term stored for each step under `name`, to watch."""

    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[name]

    return Quantity(name, value)
