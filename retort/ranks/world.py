"""The processes of a run. In a single process every method here is the identity, and nothing is exchanged.

Control is replicated and compute is divided: every rank runs the same program with the same settings, seeds, prompts
and controllers. What a rank computes of its own part is gathered, so all ranks decide alike. All methods of `World`
that exchange something are called by every rank, in the same order.
"""

# pyright: basic
from __future__ import annotations

import atexit
import contextlib
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from retort.errors import RetortError, RunError, UserError

T = TypeVar("T")

#: Variable of a process that Ray started: what `--cluster` was given.
CLUSTER = "RETORT_CLUSTER"
#: How long a rank waits for the others. One that was killed is noticed at once; this is for one that hangs.
TIMEOUT = timedelta(minutes=60)
#: What torchrun tells every process that it starts.
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Messages of gloo, nccl and the store about a rank that is gone.
_GONE = re.compile("gloo|nccl|connection (was )?(closed|reset|refused)|timed out|timeout|broken pipe|tcpstore", re.I)
_SPOKEN = "retort/spoken"
#: How long a process stays after its last exchange, seconds; a thread needs far less, also on a busy machine.
_LETTING_GO = 0.1


class World:
    """One process."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank owns the folder of a run: it alone writes and prints."""
        return self.rank == 0

    def may_speak(self) -> bool:
        """Whether nobody has printed yet why the run ends; to be asked once."""
        return True

    def each(self, work: Callable[[], T]) -> list[T]:
        """Does the work of every rank on every rank at once; the results of all, by rank.

        Raises:
            RetortError: What the work of the first rank that failed raised. All ranks raise the same.
        """
        return [work()]

    def first(self, work: Callable[[], T]) -> T:
        """Does work on rank 0 only, while the others wait; its result.

        Raises:
            RetortError: As `each`.
        """
        return self.each(lambda: work() if self.leads else None)[0]  # pyright: ignore[reportReturnType]

    def agree(self, value: T) -> T:
        """Rank 0's value, for what may differ between processes: the time, what was found on disk."""
        return self.first(lambda: value)

    def any(self, value: T | None) -> T | None:
        """What the first rank has that has something; None where nobody has."""
        return next((found for found in self.each(lambda: value) if found is not None), None)

    def part(self, items: Sequence[T], key: Callable[[T], Hashable]) -> Sequence[T]:
        """This rank's part of some items: neighbours, so that the parts of all ranks in order are the items.

        Args:
            items: The same on all ranks.
            key: Neighbours with the same key stay together.
        """
        keys = [key(item) for item in items]
        starts = [place for place, own in enumerate(keys) if place == 0 or own != keys[place - 1]] + [len(items)]
        runs = len(starts) - 1
        return items[starts[self.rank * runs // self.size] : starts[(self.rank + 1) * runs // self.size]]

    def divide(
        self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[T]], key: Callable[[Any], Hashable]
    ) -> list[T]:
        """Each rank works on its part of some items; the results of all, in the order of the items.

        Args:
            items: As in `part`.
            work: Takes a part, which may be empty.
            key: As in `part`.

        Raises:
            RetortError: As `each`.
        """
        own = self.part(items, key)
        return [found for part in self.each(lambda: work(own)) for found in part]

    def lane(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes a way of its own for what another thread exchanges; all ranks call it, as any method.

        Returns:
            What that thread enters: within, it meets the threads of the other ranks that entered theirs, in an order
            of its own, while the main threads exchange something else.
        """
        return contextlib.nullcontext

    @contextlib.contextmanager
    def watched(self, advice: str) -> Iterator[None]:
        """Within, a rank that is gone ends the run in one line that closes with the advice.

        Raises:
            RunError: Another rank was killed, ended by itself, or hangs.
        """
        yield


class _Ranks(World):
    """One of several processes, which `join` has brought together."""

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._advice = "it may have said why"
        self._own = threading.local()

    def may_speak(self) -> bool:
        try:
            return self.store.add(_SPOKEN, 1) == 1
        except Exception:  # the process that holds the store is gone: nobody can be asked
            return True

    def each(self, work: Callable[[], T]) -> list[T]:
        from torch import distributed

        try:
            mine: tuple[Any, RetortError | None] = (work(), None)
        except RetortError as error:
            mine = (None, error)
        found: list[Any] = [None] * self.size
        with self._translated(self._advice):
            distributed.all_gather_object(found, mine, group=getattr(self._own, "group", None))
        wrong = next((rank for rank, (_, error) in enumerate(found) if error is not None), None)
        if wrong is not None:
            raise mine[1] if wrong == self.rank and mine[1] is not None else found[wrong][1]
        return [result for result, _ in found]

    def lane(self) -> Callable[[], AbstractContextManager[None]]:
        from torch import distributed

        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)

        @contextlib.contextmanager
        def within() -> Iterator[None]:
            self._own.group = group
            try:
                yield
            finally:
                self._own.group = None

        return within

    @contextlib.contextmanager
    def watched(self, advice: str) -> Iterator[None]:
        before, self._advice = self._advice, advice
        try:
            with self._translated(advice):
                yield
        finally:
            self._advice = before

    @contextlib.contextmanager
    def _translated(self, advice: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RetortError) or not _GONE.search(str(error)):
                raise
            raise RunError(
                f"rank {self.rank} of {self.size} lost another rank, which was killed, ended by itself or was silent "
                f"for {TIMEOUT.seconds // 60} minutes; {advice}"
            ) from error


#: A single process.
ONE = World()
_here: list[World] = [ONE]


def here() -> World:
    """The world of this process: `ONE`, or what `join` has made."""
    return _here[0]


def join() -> World:
    """Brings together the processes that torchrun started; in a process of its own it does nothing.

    Over gloo for what is on a CPU and nccl for what is on a GPU. The second call gives what the first one made.

    Raises:
        UserError: The environment is not torchrun's, or the ranks do not run the same versions.
    """
    size = _size()
    if size == 1 or here() is not ONE:
        return here()
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    devices = torch.cuda.device_count()
    if local < devices:
        torch.cuda.set_device(local)
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if devices else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    atexit.register(_leave)
    _here[0] = world = _Ranks(rank, size, store)
    _same_versions(world)
    return world


def may_speak() -> bool:
    """Whether this process prints the error that ends it: of several ranks that fail, the first one does."""
    if here() is not ONE:
        return here().may_speak()
    # Before they are brought together all ranks fail alike. Variables that are left over do not make a rank.
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or any(not os.environ.get(name) for name in _VARIABLES)
    return alone or os.environ["RANK"] == "0"


def refuse_several(command: str) -> None:
    """Refuses to run a command once for each rank that torchrun started.

    Raises:
        UserError: There are several.
    """
    if _size() > 1:
        raise UserError(f"torchrun is for `retort train`; start `retort {command}` by itself, in one process")


def local_rank() -> int:
    """Which of the processes on this machine this one is."""
    return 0 if here() is ONE else int(os.environ["LOCAL_RANK"])


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return 1 if here() is ONE else int(os.environ["LOCAL_WORLD_SIZE"])


def _size() -> int:
    """Processes of the run, as the environment says.

    Raises:
        UserError: It names several, and lacks what torchrun says besides.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if said == "1":
        return 1
    lacking = [name for name in _VARIABLES if not os.environ.get(name)]
    if lacking or not said.isdigit() or said == "0":
        why = f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not" if lacking else "that is no number"
        raise UserError(
            f"WORLD_SIZE={said} is in the environment and {why}: for several ranks start with "
            "`torchrun --nproc-per-node N -m retort train ...`, for one process unset WORLD_SIZE"
        )
    return int(said)


def _same_versions(world: World) -> None:
    own = {"Python": platform.python_version()}
    for name in ("torch", "transformers", "retort-distill"):
        with contextlib.suppress(PackageNotFoundError):  # run from its source
            own[name] = version(name)
    for rank, other in enumerate(world.each(lambda: own)):
        for name in own:
            if other.get(name) != own[name]:
                raise UserError(
                    f"rank {world.rank} runs {name} {own[name]} and rank {rank} runs {other.get(name)}; "
                    "install the same versions for all ranks"
                )


def _leave() -> None:
    """Ends the group, and waits until its threads have let go of the tensors that they sent last.

    A mesh of devices keeps the group alive behind this, and torch's caches keep the mesh, so gloo's threads are not
    ended here. One that is the last to let go of a tensor of Python's asks for the interpreter; if that has ended in
    the meantime, C++ aborts the process ("terminate called without an active exception").
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(_LETTING_GO)
