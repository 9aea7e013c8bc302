"""Numbers of a run: means over a batch, times, and the file they go to."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.errors import RunError, UserError
from retort.files import parse_object, reason, write_bytes
from retort.ranks import here


class Means:
    """Running means by name."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: float) -> None:
        """One more value."""
        self.add_sum(name, value, 1)

    def add_sum(self, name: str, total: float, count: int) -> None:
        """Several more values, by their sum."""
        old_total, old_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (old_total + total, old_count + count)

    def values(self) -> dict[str, float]:
        """The means; a name without any value is left out."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}


class Stopwatch:
    """Times the parts of a step."""

    def __init__(self) -> None:
        """Starts the step's clock."""
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - start

    def values(self) -> dict[str, float]:
        """Seconds, as `time/<part>`, with `time/other` and `time/step`."""
        whole = time.perf_counter() - self._start
        named = {f"time/{part}": seconds for part, seconds in self._parts.items()}
        return {**named, "time/other": whole - sum(self._parts.values()), "time/step": whole}


class JsonLines:
    """A file of one JSON object per line, flushed at once, that can be cut back to a step.

    Of several ranks only the first one writes; all may read.
    """

    def __init__(self, path: Path, *, own: bool = False) -> None:
        """Prepares the file without opening it.

        Args:
            path: The file.
            own: It is this rank's own: every rank writes one, in a folder that is made with the first line, and a line
                is on the disk when `append` returns.
        """
        self.path, self.own = path, own

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a line, whole or not at all.

        Raises:
            RunError: The disk is full or the file cannot be written.
        """
        if not (here().leads or self.own):
            return
        line = (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self.own:
                self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    # A disk that fills up takes a part of the line, and refuses the rest.
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, "No space left on device")
                    if self.own:
                        os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(size)
                    raise
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {reason(error)}; the last checkpoint is intact") from None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the file, without a half-written last line.

        Raises:
            UserError: The file cannot be read, or a line in the middle of it is damaged.
        """
        return [row for _, row in self._lines()]

    def cut(self, step: int) -> None:
        """Drops lines after `step` (a resumed run writes them again) and a half-written last line.

        Raises:
            UserError: As `rows`.
            RunError: The file cannot be written.
        """
        if self.path.exists() and (here().leads or self.own):
            write_bytes(self.path, b"".join(line + b"\n" for line, row in self._lines() if row["step"] <= step))

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes other rows in the place of all; a half-written last line is gone, too.

        Raises:
            RunError: The file cannot be written; what was there before is untouched.
        """
        if here().leads or self.own:
            lines = [json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows]
            write_bytes(self.path, "".join(lines).encode("utf-8", "replace"))

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Lines as bytes, each with its row: a line may end in the middle of a character."""
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {reason(error)}") from None
        found: list[tuple[bytes, dict[str, Any]]] = []
        broken = 0
        for number, line in enumerate(lines, 1):
            row = _row(line)
            if row is None:
                broken = broken or (number if line.strip() else 0)
            elif broken:
                raise UserError(
                    f"{self.path}: line {broken} is damaged, and whole lines come after it; "
                    "put the file back as it was, or remove that line"
                )
            else:
                found.append((line, row))
        return found


def _row(line: bytes) -> dict[str, Any] | None:
    """Parses a line; None if it is damaged."""
    try:
        row = parse_object(line)
    except ValueError:
        return None
    return row if isinstance(row.get("step"), int) else None


def _finite(thing: Any) -> Any:
    """Replaces NaN by null and infinity by the word, which JSON lacks."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return None if math.isnan(thing) else ("inf" if thing > 0 else "-inf")
    if isinstance(thing, Mapping):
        return {key: _finite(item) for key, item in thing.items()}
    return [_finite(item) for item in thing] if isinstance(thing, list) else thing
