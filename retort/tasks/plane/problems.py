"""Prompts that name a shape in the plane: two moons, for one expert, and eight Gaussians, for the other."""

from __future__ import annotations

from typing import Any, Literal

from retort.tasks.plane.shapes import SHAPES

Split = Literal["train", "held_out"]
Domain = Literal["moons", "gaussians"]

DOMAINS: tuple[Domain, ...] = ("moons", "gaussians")
TRAIN_ROWS, HELD_OUT_ROWS = 384, 96
#: All words of the prompts.
WORDS = tuple(dict.fromkeys(word for name in SHAPES for word in name.split()))


def domain(prompt: str) -> Domain:
    """The domain of a prompt, which is its second word."""
    return "moons" if prompt.split()[-1].startswith("moon") else "gaussians"


def rows(split: Split, count: int | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
    """Data rows of one split.

    There are six prompts, one for each shape. Rows differ in their id, by which noise is drawn: a held-out row asks for
    a shape that the training rows ask for, too, and begins from noise that none of them has.

    Args:
        split: ``train`` (384 rows) or ``held_out`` (96 rows).
        count: Number of rows; None gives all. The shapes take turns.
        seed: Part of the ids.

    Returns:
        One dict per row with ``id``, ``prompt`` and ``domain`` (`moons` or `gaussians`, as the experts are named).

    Raises:
        ValueError: The split is unknown, or has fewer rows than are wanted.

    Example:
        >>> from retort.tasks.plane import rows
        >>> rows("train", 1)
        [{'id': 'plane-train-0-0', 'prompt': 'upper moon', 'domain': 'moons'}]
    """
    most = {"train": TRAIN_ROWS, "held_out": HELD_OUT_ROWS}.get(split)
    if most is None or (count or 0) > most:
        raise ValueError(f"plane: the splits are train ({TRAIN_ROWS} rows) and held_out ({HELD_OUT_ROWS})")
    names = list(SHAPES)
    names = [name for pair in zip(names[:3], names[3:], strict=True) for name in pair]  # the domains take turns
    return [
        {
            "id": f"plane-{split}-{seed}-{index}",
            "prompt": names[index % len(names)],
            "domain": domain(names[index % len(names)]),
        }
        for index in range(most if count is None else count)
    ]
