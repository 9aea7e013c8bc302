"""How a student's tokens lie in the units that it has in common with a teacher. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import SPANS
from retort.core.parts import Quantity


def matched_tokens() -> Quantity:
    """1 at tokens that are one shared id on both sides, 0 at tokens of longer or other units; 1 with one tokenizer."""

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        return units.at_first(units.matched_F.to(context.student_logp_N.dtype))

    return Quantity("matched_tokens", value, frozenset({SPANS}))
