"""Prompts that ask for a character in a colour at a position, in two wordings, one for each expert.

``write 'A' in red at the top left`` is a prompt of the domain `glyph`: what counts is the character. ``paint a red 'A'
at the top left`` is one of the domain `color`: what counts is the colour. All combinations of character, colour and
position are in both domains; some are held out of both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal

from retort.tasks.glyphs.pictures import COLORS, FONT, POSITIONS

Split = Literal["train", "held_out"]
Domain = Literal["glyph", "color"]

DOMAINS: tuple[Domain, ...] = ("glyph", "color")
#: All words of the prompts.
WORDS = tuple(
    dict.fromkeys(
        [
            *("write", "paint", "a", "in", "at", "the"),
            *(f"'{glyph}'" for glyph in FONT),
            *COLORS,
            *(word for position in POSITIONS for word in position.split()),
        ]
    )
)


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for.

    Attributes:
        glyph: A key of `FONT`.
        color: A key of `COLORS`.
        position: A key of `POSITIONS`.
    """

    glyph: str
    color: str
    position: str

    def text(self, domain: Domain) -> str:
        """The prompt in the words of a domain."""
        where = f"at the {self.position}"
        if domain == "glyph":
            return f"write '{self.glyph}' in {self.color} {where}"
        return f"paint a {self.color} '{self.glyph}' {where}"


@cache
def combinations(split: Split) -> tuple[Asked, ...]:
    """All combinations of a split, in an order that mixes them; four in five are for training."""
    every = [Asked(*one) for one in product(FONT, COLORS, POSITIONS)]
    mixed = sorted(every, key=lambda one: hashlib.sha256(f"glyphs {one}".encode()).digest())
    held_out = len(every) // 5
    return tuple(mixed[:held_out] if split == "held_out" else mixed[held_out:])


def rows(split: Split, count: int | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
    """Data rows of one split; no combination is in both splits.

    Args:
        split: ``train`` (384 rows) or ``held_out`` (96 rows).
        count: Number of rows; None gives all. The domains take turns.
        seed: The first combination; rows of another seed are the same in another order.

    Returns:
        One dict per row with ``id``, ``prompt`` and ``domain`` (`glyph` or `color`, as the experts are named).

    Raises:
        ValueError: The split is unknown, or has fewer rows than are wanted.

    Example:
        >>> from retort.tasks.glyphs import rows
        >>> [row["domain"] for row in rows("train", 2)]
        ['glyph', 'color']
    """
    if split not in ("train", "held_out"):
        raise ValueError("glyphs: the splits are train and held_out")
    every = combinations(split)
    most = len(DOMAINS) * len(every)
    if (count or 0) > most:
        raise ValueError(f"glyphs: the split {split} has {most} rows")
    # Within a domain each combination comes once; the other domain is half a round behind, so that neighbours differ.
    found: list[dict[str, Any]] = []
    for index in range(most if count is None else count):
        round_, domain = index // 2, DOMAINS[index % 2]
        one = every[(seed + round_ + (len(every) // 2 if domain == "color" else 0)) % len(every)]
        name = f"{one.glyph}-{one.color}-{one.position.replace(' ', '-')}"
        found.append({"id": f"glyphs-{split}-{domain}-{name}", "prompt": one.text(domain), "domain": domain})
    return found
