"""What the methods of denoising steps share."""

from dataclasses import replace
from typing import TypeVar

from retort.core.needs import GAUSSIAN
from retort.core.parts import Part

P = TypeVar("P", bound=Part)


def of_latents(part: P) -> P:
    """The part, which now needs steps that decide latents: a teacher of tokens is refused."""
    # A Gaussian is a whole policy: what was needed of one of either kind is then said by it.
    return replace(part, needs=frozenset({need for need in part.needs if not need.or_gaussian} | {GAUSSIAN}))
