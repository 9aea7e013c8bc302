"""Which neighbours go into one request."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["neighbours"]


def neighbours(sizes: Sequence[int], most: int) -> list[slice]:
    """Runs of neighbours whose sizes are at most so much together; one that is larger goes alone.

    Example:
        >>> neighbours([3, 2, 4, 9, 1], 5)
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    found, start, filled = list[slice](), 0, 0
    for place, size in enumerate(sizes):
        if place > start and filled + size > most:
            found.append(slice(start, place))
            start, filled = place, 0
        filled += size
    return [*found, slice(start, len(sizes))] if sizes else []
