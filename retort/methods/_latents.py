"""What the methods of denoising steps share."""

from dataclasses import replace
from typing import TypeVar

from retort.core.needs import GAUSSIAN
from retort.core.parts import Part

P = TypeVar("P", bound=Part)


def of_latents(part: P) -> P:
    """The part, which now also needs steps that decide latents: a teacher of tokens is refused."""
    return replace(part, needs=part.needs | {GAUSSIAN})
