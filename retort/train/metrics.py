"""Numbers of a run: means over a batch, times, and the file they go to."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retort.errors import RunError
from retort.files import reason, write_text


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
    """Where the time of a step goes."""

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
    """A file of one JSON object per line, flushed at once, that can be cut back to a step."""

    def __init__(self, path: Path) -> None:
        """Opens nothing yet."""
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a line.

        Raises:
            RunError: The disk is full or the file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {reason(error)}; the last checkpoint is intact") from None

    def cut(self, step: int) -> None:
        """Drops lines after `step` (a resumed run writes them again) and a half-written last line."""
        if not self.path.exists():
            return
        kept: list[str] = []
        # Not `splitlines`: it also cuts at separators that JSON text may hold, such as U+2028.
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= step:
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))


def _finite(thing: Any) -> Any:
    """JSON has no NaN or infinity: null, and the word."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return None if math.isnan(thing) else ("inf" if thing > 0 else "-inf")
    if isinstance(thing, Mapping):
        return {key: _finite(item) for key, item in thing.items()}
    return [_finite(item) for item in thing] if isinstance(thing, list) else thing
