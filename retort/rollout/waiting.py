"""Waiting for environments: how long at most, and whether other episodes go on meanwhile.

An environment that is waited for with a deadline, or while others go on, is called in a daemon thread. A thread cannot
be ended from outside: one that hangs is left behind, its episode is closed if it ever comes back, and it does not keep
the process from ending.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from threading import Thread
from typing import Literal, TypeVar

from retort.core.rollouts import Prompt, Status
from retort.envs.base import Environment, Episode, FailedEpisode, Reply
from retort.rollout.timeouts import Timeouts

__all__ = ["LATE", "Calls", "Waiting", "in_thread", "late", "never_begun"]

T = TypeVar("T")

#: What is measured of an episode where there is a deadline: 1 where that ended it, else 0.
LATE = "timed_out"
#: Most calls of environments at the same time that are waited for.
MOST_CALLS = 64
#: Seconds that replies which come just behind the first one are waited for, so that they are continued together.
GRACE = 0.01


@dataclass(frozen=True)
class Waiting:
    """How environments are waited for.

    Attributes:
        deadline: Seconds that an environment has for a reply, or for the beginning of an episode; None: no end.
        turns: `lockstep`: all episodes wait for the replies to a turn, which are asked for one after another; `ready`:
            replies are asked for at the same time, and an episode goes on when its own is there.
        timeouts: The record of what came too late.
    """

    deadline: float | None = None
    turns: Literal["lockstep", "ready"] = "lockstep"
    timeouts: Timeouts = field(default_factory=Timeouts)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured of every episode besides."""
        return () if self.deadline is None else (LATE,)

    @property
    def direct(self) -> bool:
        """Whether environments are called in this thread, one after another."""
        return self.deadline is None and self.turns == "lockstep"

    def words(self, turn: int) -> str:
        """What is said of an episode that was ended in a turn; 0: before its first one."""
        what = f"reply to turn {turn}" if turn else "begin the episode"
        return f"the environment did not {what} within {self.deadline or 0:g} seconds (rollout.deadline)"

    def begun(self, environment: Environment, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode] | None:
        """Begins the episodes of a prompt; None if that takes longer than the deadline for each of them.

        Raises:
            UserError: See `Environment.begin_group`.
        """
        if self.deadline is None:
            return environment.begin_group(prompt, members)
        begun = in_thread(lambda: environment.begin_group(prompt, members))
        if begun in wait([begun], self.deadline * len(members)).done:
            return begun.result()
        begun.add_done_callback(lambda late: None if late.exception() else _close(*late.result()))
        return None


def late(words: str) -> Reply:
    """The reply in place of one that did not come in time: the episode ends as truncated."""
    return Reply(over=True, status=Status.TRUNCATED, feedback=words, measures={LATE: 1.0})


def never_begun(prompt: Prompt, words: str) -> Episode:
    """The episode in place of one that did not begin in time: it ends with an error after its first turn."""
    return FailedEpisode(prompt, words, {LATE: 1.0})


class Calls:
    """Calls of environments in threads of their own, one for an episode at a time, by a number of the episode.

    Attributes:
        deadline: Seconds that a call may take; None: no end.
    """

    def __init__(self, deadline: float | None) -> None:
        """Begins without a call."""
        self.deadline = deadline
        self._due: dict[int, Callable[[], Reply]] = {}
        self._begun: dict[int, tuple[Future[Reply], float]] = {}
        self._last: dict[int, Future[Reply]] = {}

    def __len__(self) -> int:
        """Number of calls that are waited for."""
        return len(self._due) + len(self._begun)

    def __contains__(self, number: int) -> bool:
        """Whether a call is waited for."""
        return number in self._due or number in self._begun

    def ask(self, number: int, work: Callable[[], Reply]) -> None:
        """Adds a call, which begins at once unless `MOST_CALLS` others are not done."""
        self._due[number] = work
        self._begin()

    def arrived(self) -> list[tuple[int, Future[Reply] | None]]:
        """Waits until a call is done or late; all that are by then, each with its result, or None for a late one."""
        futures = [future for future, _ in self._begun.values()]
        ends = [began + self.deadline for _, began in self._begun.values()] if self.deadline is not None else []
        left = max(0.0, min(ends) - time.monotonic()) if ends else None
        if wait(futures, left, FIRST_COMPLETED).done:
            wait(futures, GRACE, ALL_COMPLETED)
        now, found = time.monotonic(), list[tuple[int, Future[Reply] | None]]()
        for number, (future, began) in self._begun.items():
            if future.done():
                found.append((number, future))
            elif self.deadline is not None and now - began >= self.deadline:
                found.append((number, None))
        for number, _ in found:
            del self._begun[number]
        self._begin()
        return found

    def close(self, number: int, episode: Episode) -> None:
        """Closes an episode: at once, for at most the deadline; or when a call of it that hangs comes back."""
        last = self._last.get(number)
        if last is not None and not last.done():
            last.add_done_callback(lambda _: _close(episode))
        elif self.deadline is None:
            episode.close()
        else:
            closed = in_thread(episode.close)
            if closed in wait([closed], self.deadline).done:
                closed.result()

    def _begin(self) -> None:
        while self._due and len(self._begun) < MOST_CALLS:
            number = next(iter(self._due))
            future = in_thread(self._due.pop(number))
            self._begun[number], self._last[number] = (future, time.monotonic()), future


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Begins a call in a daemon thread."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # it is raised where the result is read
            found.set_exception(error)
        else:
            found.set_result(result)

    Thread(target=run, name="retort-environment", daemon=True).start()
    return found


def _close(*episodes: Episode) -> None:
    """Closes episodes that nobody waits for any more."""
    for episode in episodes:
        with contextlib.suppress(Exception):
            episode.close()
