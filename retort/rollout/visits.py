"""What is made of the visits to prompts, each as soon as it can be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Generic, TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


class Visits(Generic[Item, T]):
    """Neighbours among some items, of which something is made once."""

    def __init__(
        self,
        items: Sequence[Item],
        key: Callable[[Item], Hashable],
        make: Callable[[Sequence[Item]], Sequence[T] | None],
    ) -> None:
        """Makes nothing yet.

        Args:
            items: The items.
            key: Neighbours with the same key are one visit.
            make: Makes what is to be had of a visit; None where some of its items are not ready.
        """
        self._visits = [list(own) for _, own in groupby(items, key=key)]
        self._of = {id(own): number for number, visit in enumerate(self._visits) for own in visit}
        self._made: dict[int, Sequence[T]] = {}
        self._make = make

    def look(self, item: Item) -> None:
        """Makes what is to be had of an item's visit, unless that was done."""
        number = self._of[id(item)]
        if number not in self._made:
            found = self._make(self._visits[number])
            if found is not None:
                self._made[number] = found

    @property
    def all(self) -> list[T]:
        """What was made of all visits, in their order."""
        return [own for number in range(len(self._visits)) for own in self._made[number]]
