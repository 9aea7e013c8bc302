"""The before/after table, `eval.json`: written as soon as each row is known, so that nothing computed is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.config import Config
from retort.data import fingerprint
from retort.errors import UserError
from retort.evaluate.evaluator import Evaluator
from retort.evaluate.flows import FlowEvaluator
from retort.files import parse_object, read_object, write_bytes, write_text
from retort.rewards.user import is_user_defined
from retort.train.output import samples

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"
#: Begins the label of one of several teachers.
_ONE_TEACHER = f"{TEACHER} "
#: Parts of an evaluator's row that are stored beside the table, by model.
_BESIDE = ("pass_at", "profile", "given_up", "by_domain", "kl_by_step", "samples")


def read(folder: Path, evaluator: Evaluator | FlowEvaluator | None, config: Config) -> dict[str, Any]:
    """Reads the table of a resumed run, or makes an empty one.

    Raises:
        UserError: `eval.json` is damaged. Lines of `answers.jsonl` that are stay as they are; the report names them.
    """
    path = folder / "eval.json"
    if path.exists():
        remedy = "put the file back as it was, or remove it and do without what was evaluated before"
        try:
            found = read_object(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        odd = _odd(found)
        if odd is not None:
            raise UserError(f"{path}: {odd}; {remedy}")
        return found
    return {
        "k": config.eval.samples,
        "problems": len(evaluator.prompts) if evaluator else 0,
        **(evaluator.graded() if evaluator else {}),
        **({"each": "sample"} if isinstance(evaluator, FlowEvaluator) else {}),
        **({"held_out": fingerprint(evaluator.prompts)} if evaluator else {}),
        "seed": config.seed,
        "task": config.data
        if config.builtin and not is_user_defined(config.task)
        else (config.task or _eval_data(config)),
        "threshold": config.eval.threshold,
        "rows": [],
        "pass_at": {},
        "gap_recovered": {},
        "profile": {},
    }


def _eval_data(config: Config) -> str:
    """The name of the held-out data: a file's name without its folder."""
    name = config.eval.data or config.data or "data"
    return Path(name).name if Path(name).exists() else name


def has(results: Mapping[str, Any], who: str) -> bool:
    """Whether the table has a row."""
    return any(row["who"] == who for row in results["rows"])


def of_teacher(name: str) -> str:
    """The label of the row of one of several teachers."""
    return _ONE_TEACHER + name


def scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The means of an evaluator's row by name."""
    return {name: cell["value"] for name, cell in row.items() if isinstance(cell, Mapping) and "value" in cell}


def add(folder: Path, results: Mapping[str, Any], who: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Adds or replaces a row, and writes the table to disk.

    Its completions go to `answers.jsonl`, the images of its samples to the folder `samples`.
    """
    order, row = [BEFORE, AFTER, TEACHER], samples.keep(folder, row)
    cells = {name: cell for name, cell in row.items() if name not in ("answers", *_BESIDE)}
    rows = [old for old in results["rows"] if old["who"] != who] + [{"who": who, **cells}]
    updated = {**results, "rows": sorted(rows, key=lambda found: [*order, found["who"]].index(found["who"]))}
    for name in (name for name in _BESIDE if name in results or name in row):
        updated[name] = {**results.get(name, {}), **({who: row[name]} if name in row else {})}
    updated["gap_recovered"] = _recovered(updated)
    _write_completions(folder / "answers.jsonl", who, row.get("answers", []))
    write_text(folder / "eval.json", json.dumps(updated, indent=2) + "\n")
    return updated


def _odd(found: Mapping[str, Any]) -> str | None:
    """Why a file is not a table of results; None if it is one."""
    rows = found.get("rows")
    if type(found.get("k")) is not int or not isinstance(rows, list):
        return "holds no table ('k' and 'rows')"
    for number, row in enumerate(rows):
        who = row.get("who") if isinstance(row, Mapping) else None
        if who not in (BEFORE, AFTER, TEACHER) and not (isinstance(who, str) and who.startswith(_ONE_TEACHER)):
            return f"row {number} of its table is of nobody who is evaluated"
        for name, cell in row.items():
            ends = [cell.get(end) for end in ("value", "low", "high")] if isinstance(cell, Mapping) else []
            numbers = all(isinstance(end, int | float) or (end is None and at) for at, end in enumerate(ends))
            if name != "who" and cell is not None and not (ends and numbers):
                return f"'{name}' of '{who}' is no number with its interval"
    beside = [name for name in (*_BESIDE, "gap_recovered") if not isinstance(found.get(name, {}), Mapping)]
    return f"'{beside[0]}' is no object" if beside else None


def _generated_by(line: bytes) -> str | None:
    """The model that generated a recorded completion; None for a damaged line."""
    try:
        who = parse_object(line).get("who")
    except ValueError:
        return None
    return who if isinstance(who, str) else None


def _write_completions(path: Path, who: str, completions: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the completions of one model."""
    # Bytes, and not `splitlines`, which also cuts at separators that JSON text may hold, such as U+2028.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    kept = [
        line for line in lines if line and _generated_by(line) != who
    ]  # what is damaged stays, for the report to name
    added = [
        json.dumps({"who": who, **completion}, ensure_ascii=False).encode("utf-8", "replace")
        for completion in completions
    ]
    if kept or added:
        write_bytes(path, b"".join(line + b"\n" for line in [*kept, *added]))


def _recovered(results: Mapping[str, Any]) -> dict[str, float]:
    """Share of the gap between student and teacher that was closed: (after - before) / (teacher - before)."""
    rows = {row["who"]: row for row in results["rows"]}
    if not {BEFORE, AFTER, TEACHER} <= set(rows):
        return {}
    shares: dict[str, float] = {}
    for name in (f"avg@{results['k']}", f"pass@{results['k']}"):
        cells = [rows[who].get(name) for who in (BEFORE, AFTER, TEACHER)]
        if all(cells):
            before, after, teacher = (cell["value"] for cell in cells)
            if teacher > before:
                shares[name] = (after - before) / (teacher - before)
    return shares
