"""Some work on several items in threads of their own, a few of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


def at_once(
    work: Callable[[Item], T],
    items: Sequence[Item],
    most: int,
    given_up: threading.Event,
    on_result: Callable[[int, T], None],
) -> list[T]:
    """The results of some work on each item, in order.

    Args:
        work: The work; that on a single item is done in this thread.
        items: The items.
        most: Most items that are worked on at once.
        given_up: Set while the work under way is waited for, once one has failed or this thread was interrupted.
        on_result: Takes the place of an item and its result as soon as that is there; called in this thread.

    Raises:
        RetortError: What the first item (in order) that failed raised.
    """
    if min(len(items), most) < 2:
        found = list[T]()
        for place, item in enumerate(items):
            found.append(work(item))
            on_result(place, found[-1])
        return found
    try:
        with ThreadPoolExecutor(most) as pool:
            places = {pool.submit(work, item): place for place, item in enumerate(items)}
            try:
                for future in as_completed(places):
                    if future.exception() is not None:
                        break  # the first one in order is raised below
                    on_result(places[future], future.result())
                return [future.result() for future in places]
            except BaseException:  # an interruption, too: the others are tried no more
                given_up.set()
                raise
            finally:
                for future in places:
                    future.cancel()
    finally:
        given_up.clear()  # all threads have ended
