"""Reading the files of a run, any of which may be missing, torn or from another version."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retort.errors import UserError

FILES = ("config.json", "metrics.jsonl", "rollouts.jsonl", "eval.json")


@dataclass(frozen=True)
class RunFiles:
    """What was found of one run.

    Attributes:
        name: Short name, different from that of every other run on the page.
        config: Resolved configuration.
        curves: Metric -> its finite values as (step, value), in order of steps.
        rollouts: A few recorded rollouts, spread over the run.
        eval: Contents of `eval.json`.
        notes: What is missing or odd, for the reader.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    rollouts: Sequence[Mapping[str, Any]] = ()
    eval: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def read_runs(run_dirs: Sequence[Path], rollouts: int) -> list[RunFiles]:
    """Reads runs that will share a page.

    Args:
        run_dirs: Their folders.
        rollouts: How many rollouts to keep, over all runs.

    Raises:
        UserError: No folder, or one that holds no run.
    """
    if not run_dirs:
        raise UserError("report: name at least one run's folder")
    names = _names(run_dirs)
    share = max(1, rollouts // len(run_dirs))
    return [_read(path, name, share) for path, name in zip(run_dirs, names, strict=True)]


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(run_dirs, 1)]


def _read(run_dir: Path, name: str, rollouts: int) -> RunFiles:
    if not run_dir.is_dir():
        raise UserError(f"report: there is no folder {run_dir}; name the folder that a run wrote to")
    if not any((run_dir / file).exists() for file in FILES):
        raise UserError(f"report: {run_dir} holds no run (none of {', '.join(FILES)})")
    notes: list[str] = []
    metrics = _lines(run_dir / "metrics.jsonl", notes)
    return RunFiles(
        name=name,
        config=_object(run_dir / "config.json", notes),
        curves=_curves(metrics, notes),
        rollouts=_spread(_lines(run_dir / "rollouts.jsonl", notes), rollouts),
        eval=_object(run_dir / "eval.json", notes),
        notes=notes,
    )


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    return None


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is not a JSON object.")
        return {}
    return found


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a run that was killed may leave a torn last line."""
    text = _text(path, notes)
    rows: list[dict[str, Any]] = []
    torn = 0
    for line in (text or "").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    if torn:
        notes.append(
            f"{path.name}: left out {torn} line{'s' * (torn > 1)} that {'are' if torn > 1 else 'is'} not JSON."
        )
    if text is not None and not rows:
        notes.append(f"{path.name} is empty.")
    return rows


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def as_object(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _curves(rows: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {}
    odd: dict[str, float] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        for key, value in row.items():
            value_here = number(value)
            if value_here is not None:
                found.setdefault(key, {})[step] = value_here  # after a resume the later line of a step counts
            elif value in ("inf", "-inf") or isinstance(value, float):
                odd.setdefault(key, step)
    notes += [f"{key} is not finite at step {step:g} (left out of its curve)." for key, step in odd.items()]
    found.pop("step", None)
    return {key: sorted(points.items()) for key, points in found.items()}


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Rows from the whole run: the first, the last, and evenly between."""
    if len(rows) <= count:
        return list(rows)
    if count == 1:
        return [rows[-1]]
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]
