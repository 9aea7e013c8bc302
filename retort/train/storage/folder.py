"""The folder of a run and its lock.

Everything before `Run.go` only reads. `Run.go` claims the folder, with a lock of the kernel's that ends with the
process, and nothing is written without that claim.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock, Timeout

from retort.errors import RunError, UserError
from retort.files import read_object, reason, unnameable
from retort.ranks import World

LOCK = ".lock"
#: Folder of the records of replies that came too late, one of each rank.
TIMEOUTS = "timeouts"
#: Folder of the weights and the log of a process that writes the rollouts.
ENGINE = "engine"
#: Files that a run writes: a folder with one of these is a run, or holds files that a run would replace.
FILES = (
    "config.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "eval.json",
    "answers.jsonl",
    "checkpoints",
    "model",
    "adapter",
    "report.html",
    "trust.json",
    "teacher_rollouts.jsonl",
    "dropped.jsonl",
    "difficulty.jsonl",
    TIMEOUTS,
    "thumbnails",
    "samples",
    "judge.jsonl",
    ENGINE,
    "tensorboard",
    "given-data.jsonl",
    "given-eval-data.jsonl",
)
#: Keys that tell the settings of a run from any other `config.json`, such as that of a model.
_OURS = {"method", "rollout", "optimizer", "checkpoint"}


def is_run(folder: Path) -> bool:
    """Whether a folder holds the settings of a run."""
    try:
        return read_object(folder / "config.json").keys() >= _OURS
    except UserError:
        return False


def refuse_taken(folder: Path) -> None:
    """Checks, without writing, that a new run may have a folder.

    Raises:
        UserError: It is no folder, cannot be written, is in use, or holds a run or files that a run would replace.
    """
    problem = unnameable(str(folder))
    if problem is not None:
        raise UserError(f"out = {folder}: {problem}; choose another folder with --out")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # A name that no file can have is an error here; `exists` only says that it is absent.
        there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not ancestor.is_dir():
            raise UserError(f"out = {folder}: {ancestor} is not a folder; choose another folder with --out")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise UserError(f"out = {folder}: no permission to write in {ancestor}; choose another folder with --out")
    except (OSError, ValueError) as error:  # A NUL in the name is a ValueError.
        raise UserError(f"out = {folder}: {reason(error)}; choose another folder with --out") from None
    refuse_held(folder)
    refuse_files(folder, there)


def refuse_files(folder: Path, there: Collection[str]) -> None:
    """Checks that no file of a folder is one that a new run would replace.

    Args:
        folder: The folder of the run.
        there: Names of its entries.

    Raises:
        UserError: The folder holds a run, or other files of these names.
    """
    found = [name for name in FILES if name in there]
    if is_run(folder):
        if found != ["config.json"]:
            raise UserError(
                f"out = {folder}: holds a run already; go on with --resume {folder}, or choose another --out"
            )
    elif found:
        raise UserError(
            f"out = {folder}: holds {', '.join(found)}, which no run wrote and a run would replace; "
            "choose another folder with --out"
        )


def refuse_held(folder: Path) -> None:
    """Checks, without writing, that no process is at work in a run's folder.

    Raises:
        UserError: A process is at work; the message names it.
    """
    if (folder / LOCK).exists():
        Claim(folder).take().release()


def refuse_unshared(folder: Path, world: World) -> None:
    """Checks that all ranks see the folder that the first one has claimed.

    Raises:
        UserError: One does not; its own folder of that name is another one.
    """
    if world.size == 1:
        return
    token = folder / f".ranks-{world.agree(uuid.uuid4().hex)}"
    world.first(lambda: _left(token))
    seen = world.each(token.exists)
    world.first(lambda: token.unlink(missing_ok=True))
    if not all(seen):
        raise UserError(
            f"out = {folder}: rank {seen.index(False)} does not see what rank 0 writes there; choose a folder that all "
            "ranks share"
        )


def _left(token: Path) -> None:
    try:
        token.touch()
    except OSError as error:
        raise UserError(f"{token.parent}: cannot be written: {reason(error)}") from None


class Claim:
    """The right to write into the folder of a run: one process at a time has it."""

    def __init__(self, folder: Path) -> None:
        """Prepares the claim without taking it."""
        self.folder = folder
        self._lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        self._place: tuple[int, int] | None = None

    def take(self, *, make: bool = False) -> Claim:
        """Takes the claim, and makes the folder where asked.

        Raises:
            UserError: Another process has it, or the folder cannot be written.
        """
        try:
            if make:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._place = self._where()
        except Timeout:
            holder = self._holder()
            raise UserError(f"{self.folder}: another run is at work there ({holder}); wait for its end") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: cannot be written: {reason(error)}") from None
        return self

    @property
    def held(self) -> bool:
        """Whether the claim is taken."""
        return self._lock.is_locked

    def sign(self) -> None:
        """Writes the holder into the lock, for the messages of other processes."""
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        about = {"pid": os.getpid(), "host": platform.node(), "command": command, "since": since}
        try:
            (self.folder / LOCK).write_text(json.dumps(about) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.folder / LOCK}: {reason(error)}") from None

    def check(self) -> None:
        """Looks whether the folder is still the one that was claimed.

        Raises:
            RunError: It was removed, renamed or replaced: writing on would leave half a run.
        """
        if self._where() != self._place:
            raise RunError(
                f"{self.folder}: the run's folder was removed or renamed while the run was at work; if it was renamed, "
                "resume it by its new name"
            )

    def release(self) -> None:
        """Gives the claim back."""
        self._lock.release()

    def _where(self) -> tuple[int, int] | None:
        try:
            found = self.folder.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _holder(self) -> str:
        try:
            about = read_object(self.folder / LOCK)
            return f"process {int(about['pid'])} on {about['host']}, {about['command']!r}, since {about['since']}"
        except (UserError, ValueError, KeyError, TypeError):
            return "it did not say who it is"


class NoClaim(Claim):
    """That of a rank that never writes: rank 0 holds the claim for all."""

    def __init__(self, folder: Path) -> None:
        """Takes nothing yet."""
        super().__init__(folder)
        self._taken = False

    @property
    def held(self) -> bool:
        return self._taken

    def take(self, *, make: bool = False) -> Claim:
        self._taken = True
        return self

    def check(self) -> None:
        """Nothing: rank 0 looks."""

    def release(self) -> None:
        self._taken = False
