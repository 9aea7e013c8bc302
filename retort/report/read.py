"""Reading the files of a run, any of which may be missing, torn or from another version."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retort.errors import UserError

FILES = ("config.json", "metrics.jsonl", "rollouts.jsonl", "eval.json", "answers.jsonl")


@dataclass(frozen=True)
class RunFiles:
    """What was found of one run.

    Attributes:
        name: Short name, different from that of every other run on the page.
        folder: Where it lies.
        config: Resolved configuration.
        curves: Metric -> its finite values as (step, value), in order of steps.
        rollouts: Some of the recorded rollouts, spread evenly over the run.
        recorded: How many were recorded.
        answers: Recorded answers to held-out prompts.
        eval: Contents of `eval.json`.
        notes: What is missing or odd, for the reader.
        alone: Whether it stands for itself, also beside runs that differ in their seed only.
    """

    name: str
    folder: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    rollouts: Sequence[Mapping[str, Any]] = ()
    recorded: int = 0
    answers: Sequence[Mapping[str, Any]] = ()
    eval: Mapping[str, Any] = field(default_factory=dict)
    trust: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    alone: bool = False


def find_runs(places: Sequence[Path]) -> dict[Path, bool]:
    """The folders of runs among some places: each a run itself, or a folder with runs in it, at any depth.

    Returns:
        Folder -> whether it was named itself.

    Raises:
        UserError: No folder, or no run in it.
    """
    found: dict[Path, bool] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"report: there is no folder {place}; name the folder that a run wrote to")
        inside = [place] if _is_run(place) else sorted({path.parent for path in place.rglob("config.json")})
        runs = [folder for folder in inside if _is_run(folder)]
        if not runs:
            raise UserError(f"report: {place} holds no run (no folder with config.json and metrics.jsonl or eval.json)")
        found |= {run: run == place for run in runs if not found.get(run)}
    return found


def _is_run(folder: Path) -> bool:
    # The folder of a model has a config.json, too.
    own = ("metrics.jsonl", "rollouts.jsonl", "eval.json")
    return any((folder / name).is_file() for name in own) or (
        (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    )


def read_runs(run_dirs: Mapping[Path, bool], rollouts: int) -> list[RunFiles]:
    """Reads runs that will share a page.

    Args:
        run_dirs: Their folders, and whether each was named itself.
        rollouts: How many rollouts to keep, over all runs.
    """
    names = _names(list(run_dirs))
    share = max(1, rollouts // len(run_dirs))
    return [replace(_read(path, name, share), alone=run_dirs[path]) for path, name in zip(run_dirs, names, strict=True)]


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(run_dirs, 1)]


def _read(run_dir: Path, name: str, rollouts: int) -> RunFiles:
    notes: list[str] = []
    metrics = _lines(run_dir / "metrics.jsonl", notes)
    chosen, recorded = _some_lines(run_dir / "rollouts.jsonl", rollouts, notes)
    return RunFiles(
        name=name,
        folder=run_dir,
        config=_object(run_dir / "config.json", notes),
        curves=_curves(metrics, notes),
        rollouts=chosen,
        recorded=recorded,
        # Older runs, and those that judge nothing, have none: that is no gap in the page.
        answers=_lines(run_dir / "answers.jsonl", []),
        eval=_object(run_dir / "eval.json", notes),
        trust=_object(run_dir / "trust.json", notes) if (run_dir / "trust.json").exists() else {},
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


def _some_lines(path: Path, count: int, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Some rows of a JSON-lines file, from its whole length, and how many it has; however large, little is held."""
    try:
        with path.open("rb") as file:
            starts = [0]
            for line in file:
                starts.append(starts[-1] + len(line))
            ends = list(itertools.pairwise(starts))
            rows: list[dict[str, Any]] = []
            for index in spread(len(ends), count):
                file.seek(ends[index][0])
                row = _row(file.read(ends[index][1] - ends[index][0]))
                if row is not None:
                    rows.append(row)
                elif index < len(ends) - 1:  # the last may be torn: the run was killed, or is going on
                    notes.append(f"{path.name}: line {index + 1} is not JSON (left out).")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
        return [], 0
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return [], 0
    if not rows:
        notes.append(f"{path.name} is empty.")
    return rows, len(ends)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def spread(total: int, count: int) -> list[int]:
    """Places in a list of `total`: the first, the last, and evenly between."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [total - 1]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
