"""The units of a recorded rollout whose teacher has another tokenizer, as the page's script draws them.

The files may be damaged or somebody else's: what does not fit together is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from retort.report.read import as_list, as_object, number

Column = Sequence[float | None]


def units_of(row: Mapping[str, Any], count: int, columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """The units of a row by view, for those views that have any.

    Each has `unit` (index of each token's unit, null in none), and a list per unit of `read` (the teacher's tokens),
    `student` and `teacher` (log-prob of the unit on each side, nats, null where not known).

    Args:
        row: A line of `rollouts.jsonl`.
        count: Number of its tokens.
        columns: Its columns.
    """
    found: dict[str, dict[str, Any]] = {}
    for view, own in as_object(row.get("units")).items():
        sizes = [_size(size) for size in as_list(as_object(own).get("sizes"))]
        unit = _numbered(sizes)
        if len(sizes) != count or unit is None:
            continue
        texts = [str(text) for text in as_list(as_object(own).get("tokens"))]
        begun = [size for size in sizes if size]
        following = iter(texts)
        read = [list(islice(following, size)) for size in begun] if sum(begun) == len(texts) else None
        sides = {
            side: sums(columns.get(f"{name}_logp"), unit) for side, name in (("student", "student"), ("teacher", view))
        }
        found[str(view)] = {"unit": unit, **({"read": read} if read else {}), **sides}
    return found


def sums(column: Column | None, unit: Sequence[int | None]) -> list[float | None]:
    """A column's sum over each unit; null where a number of it is not known, or the column is not there."""
    found: list[float | None] = [0.0] * (1 + max((index for index in unit if index is not None), default=-1))
    if column is None or len(column) != len(unit):
        return [None] * len(found)
    for index, value in zip(unit, column, strict=True):
        if index is not None:
            before = found[index]
            found[index] = None if before is None or value is None else before + value
    return [None if value is None else float(f"{value:.4g}") for value in found]


def over_unit(column: Column, unit: Sequence[int | None]) -> list[float | None]:
    """A column with its mean over each unit at every token of the unit, and null outside of all units."""
    totals = sums(column, unit)
    own = [0] * len(totals)
    for index in unit:
        if index is not None:
            own[index] += 1
    means = [None if total is None else float(f"{total / size:.4g}") for total, size in zip(totals, own, strict=True)]
    return [None if index is None else means[index] for index in unit]


def _size(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def _numbered(sizes: Sequence[int | None]) -> list[int | None] | None:
    """The unit of each token; None where one goes on that has not begun."""
    unit: list[int | None] = []
    last, here = -1, False
    for size in sizes:
        if size is None:
            here = False
        elif size > 0:
            last, here = last + 1, True
        elif not here:
            return None
        unit.append(last if here else None)
    return unit
