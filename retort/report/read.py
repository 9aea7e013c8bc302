"""Reading the files of a run, any of which may be missing, torn or from another version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from retort.errors import UserError, visible
from retort.files import parse_object, read_object, reason

#: Numbers beyond this overflow when they are added up or drawn, and none that means anything is.
_LARGEST = 1e100
#: Steps beyond this are not told apart by a float.
_LAST_STEP = 2.0**50

FILES = ("config.json", "metrics.jsonl", "rollouts.jsonl", "eval.json", "answers.jsonl")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, as far as they could be read.

    Attributes:
        name: Short name, different from that of every other run on the page.
        folder: Path of the run.
        config: Resolved configuration.
        curves: Metric -> its finite values as (step, value), in order of steps.
        rollouts: Some of the recorded rollouts, spread evenly over the run.
        recorded: Number of rollouts that were recorded.
        completions: Rows of `answers.jsonl`: recorded completions of held-out prompts.
        eval: Contents of `eval.json`.
        notes: Sentences on what is missing or odd.
        damage: Sentences on what was left out because it is damaged.
        learnt_from: Digest of its training prompts, where a checkpoint of it holds one.
        remarks: Sentences on what the settings switched off.
        alone: Whether the run is shown by itself, also beside runs that differ in their seed only.
    """

    name: str
    folder: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    rollouts: Sequence[Mapping[str, Any]] = ()
    recorded: int = 0
    completions: Sequence[Mapping[str, Any]] = ()
    eval: Mapping[str, Any] = field(default_factory=dict)
    trust: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    damage: Sequence[str] = ()
    learnt_from: str | None = None
    remarks: Sequence[str] = ()
    alone: bool = False


def find_runs(paths: Sequence[Path]) -> dict[Path, bool]:
    """Finds runs: each path is a run itself, or a folder with runs in it at any depth.

    Returns:
        Folder -> whether it was named itself.

    Raises:
        UserError: A path is no folder, or holds no run.
    """
    found: dict[Path, bool] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"report: there is no folder {path}; name the folder that a run wrote to")
        inside = [path] if _is_run(path) else sorted({file.parent for file in path.rglob("config.json")})
        runs = [folder for folder in inside if _is_run(folder)]
        if not runs:
            raise UserError(f"report: {path} holds no run (no folder with config.json and metrics.jsonl or eval.json)")
        found |= {run: run == path for run in runs if not found.get(run)}
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
        names = [visible("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{visible(path.name)} ({index})" for index, path in enumerate(run_dirs, 1)]


def _read(run_dir: Path, name: str, rollouts: int) -> RunFiles:
    notes, damage = list[str](), list[str]()
    metrics = _lines(run_dir / "metrics.jsonl", notes, damage)
    chosen, recorded = _some_lines(run_dir / "rollouts.jsonl", rollouts, notes, damage)
    config = _object(run_dir / "config.json", notes, damage)
    results = _object(run_dir / "eval.json", notes, damage)
    # Older runs, and those that evaluate nothing, have none of these: that is no gap in the page.
    completions = _lines(run_dir / "answers.jsonl", [], damage)
    trust = _object(run_dir / "trust.json", [], damage)
    curves = _curves(metrics, notes)
    remarks = _explain_missing(config, notes)
    if damage and not any((curves, chosen, results, completions, trust)):
        raise UserError(f"report: {run_dir}: nothing of this run can be read: {' '.join(damage)}")
    return RunFiles(
        name=name,
        folder=run_dir,
        config=config,
        curves=curves,
        rollouts=chosen,
        recorded=recorded,
        completions=completions,
        eval=results,
        trust=trust,
        notes=[*notes, *damage],
        damage=damage,
        learnt_from=_learnt_from(run_dir),
        remarks=remarks,
    )


def _explain_missing(config: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Removes notes on what the settings switched off, and returns sentences that say so instead."""
    said: list[str] = []
    for name, section, key, words in (
        ("eval.json", "eval", "problems", "Nothing was evaluated on held-out prompts"),
        ("rollouts.jsonl", "record", "rollouts", "No rollouts were recorded"),
    ):
        note = f"{name} is missing."
        if as_object(config.get(section)).get(key) == 0 and note in notes:
            notes.remove(note)
            said.append(f"{words} ({section}.{key} = 0).")
    return said


def _learnt_from(run_dir: Path) -> str | None:
    """The digest of the training prompts in the newest checkpoint; None where there is none."""
    states = [path for path in (run_dir / "checkpoints").glob("step-*/state.json") if path.parent.name[5:].isdecimal()]
    try:
        newest = max(states, key=lambda path: int(path.parent.name[5:]))
        found = read_object(newest).get("data")
    except (UserError, ValueError):  # damaged, or no checkpoint
        return None
    return found if isinstance(found, str) else None


def _object(path: Path, notes: list[str], damage: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        return read_object(path)
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ")
        damage.append(f"{path.name} is not a JSON object. (It {why}.)")
        return {}


def _lines(path: Path, notes: list[str], damage: list[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a run that was killed may leave a torn last line."""
    return _some_lines(path, None, notes, damage)[0]


def _some_lines(path: Path, count: int | None, notes: list[str], damage: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Some rows of a JSON-lines file, from its whole length, and how many it has; however large, little is held.

    Args:
        path: Path of the file.
        count: Largest number of rows; None for all.
        notes: Collects what is missing.
        damage: Collects what was left out.
    """
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    torn = False
    try:
        with path.open("rb") as file:
            spans = _line_spans(file)
            for index in range(len(spans)) if count is None else spread(len(spans), count):
                line, start, size = spans[index]
                file.seek(start)
                content = file.read(size)
                try:
                    rows.append(parse_object(content))
                except ValueError as error:
                    torn = index == len(spans) - 1 and not content.endswith(b"\n")
                    bad.append(f"line {line} {'is cut off' if torn else error}")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
        return [], 0
    except OSError as error:
        damage.append(f"{path.name} cannot be read: {reason(error)}.")
        return [], 0
    if bad:
        are = "s that are" if len(bad) > 1 else " that is"
        first = "The first: " if len(bad) > 1 else ""
        said = f"{path.name}: left out {len(bad)} line{are} not JSON. ({first}{bad[0]}.)"
        # A killed run leaves its last line cut off, and one that goes on may be writing it: that is no damage.
        (notes if torn and rows and len(bad) == 1 else damage).append(said)
    if not rows:
        notes.append(f"{path.name} is empty.")
    return rows, len(spans)


def _line_spans(file: BinaryIO) -> list[tuple[int, int, int]]:
    """Number, start and size of each line that is not blank."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for line, content in enumerate(file, 1):
        if content.strip():
            found.append((line, start, len(content)))
        start += len(content)
    return found


def number(value: Any) -> float | None:
    """The value if it is a number that can be drawn: nothing beyond 1e100, and 0 for what is within 1e-100 of it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value) if abs(value) >= 1 / _LARGEST else 0.0


def as_object(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> Sequence[Any]:
    """The value if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else ()


def _curves(rows: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {}
    odd: dict[str, tuple[str, float]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None or abs(step) > _LAST_STEP:
            continue
        for key, value in row.items():
            value_here = number(value)
            if value_here is not None:
                found.setdefault(key, {})[step] = value_here  # after a resume the later line of a step counts
            elif value in ("inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
                finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
                odd.setdefault(key, ("beyond 1e100" if finite else "not finite", step))
    notes += [f"{key} is {what} at step {step:g} (left out of its curve)." for key, (what, step) in odd.items()]
    found.pop("step", None)
    return {key: sorted(points.items()) for key, points in found.items()}


def spread(total: int, count: int) -> list[int]:
    """Indices into a list of `total`: the first, the last, and evenly spaced ones between."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [total - 1]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
