"""`retort.distill`: a whole run in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retort import config as configuration
from retort.errors import UserError
from retort.method import Method
from retort.train import runner
from retort.train.doctor import examine, examine_setup, refuse
from retort.train.findings import Examination
from retort.train.observe import Observer


def distill(
    *,
    student: str | None = None,
    teacher: str | None = None,
    base: str | None = None,
    data: str | None = None,
    method: str | Method | Mapping[str, Any] | None = None,
    out: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: str | None = None,
    observer: Observer | None = None,
) -> runner.Run:
    """Distils a teacher into a student, on-policy. Without models and data it runs the built-in task.

    Args:
        student: Model folder or hub name.
        teacher: Model folder or hub name; not for methods in which the student teaches itself.
        base: Model folder or hub name of a second frozen model, for methods that ask one; by default the student as it
            was before training.
        data: JSON lines, Parquet or a hub name, with a column `prompt` or `messages`.
        method: A name, a mapping with `name` and settings, or a `Method`, also one of your own.
        out: Folder of the run; by default `runs/<method>-<time>`.
        steps: Batches of rollouts; by default once through the data.
        seed: Of all random streams.
        settings: Further settings, nested as in a TOML file, e.g. `{"optimizer": {"learning_rate": 1e-5}}`.
        resume: Folder of a run to go on with, or one of its checkpoints; then only `steps` may be given besides, and
            `method` if it was one of your own.
        observer: Who watches; nobody by default.

    Returns:
        The finished run: `.folder`, `.results` (the before/after table), `.setup.student`.

    Raises:
        UserError: Anything about the input is wrong; one line says what and what to do.
        RunError: The run had to stop; it names the checkpoint to go on from.
    """
    named = {"name": method} if isinstance(method, str) else method
    own = method if isinstance(method, Method) else None
    given = {
        "student": student,
        "teacher": teacher,
        "base": base,
        "data": data,
        "out": out,
        "steps": steps,
        "seed": seed,
    }
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if isinstance(named, Mapping):
        flags["method"] = named
    if resume is not None:
        if set(flags) - {"steps"} or settings:
            raise UserError("resume goes on with the settings of the run; only steps may be given besides")
        run = runner.resume(Path(resume), observer, steps=steps, method=own)
    else:
        config = assemble(flags, settings or {}, own=own)
        run = runner.start(config, folder_of(config), observer, method=own)
        check(run)
    run.go()
    write_report(run.folder)
    return run


def doctor(
    *,
    student: str | None = None,
    teacher: str | None = None,
    base: str | None = None,
    data: str | None = None,
    method: str | Method | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Examination:
    """Checks a pair before any time is spent on it: what `retort doctor` prints. Nothing is trained or written.

    Args:
        student: As in `distill`, as are all arguments not named here.
        teacher: As in `distill`.
        base: As in `distill`.
        data: As in `distill`.
        method: As in `distill`.
        settings: As in `distill`.
        quick: Leave out the checks that generate; these are the ones that `distill` makes.

    Returns:
        `.verdict` (ok, warn or fatal) and `.checks`: what each saw, why it matters, what to do.

    Raises:
        UserError: A setting that does not exist or has the wrong type. What is wrong with models and data is a finding.
    """
    named = {"name": method} if isinstance(method, str) else method
    own = method if isinstance(method, Method) else None
    given = {"student": student, "teacher": teacher, "base": base, "data": data}
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if isinstance(named, Mapping):
        flags["method"] = named
    return examine(assemble(flags, settings or {}, own=own), own, quick=quick)


def check(run: runner.Run) -> None:
    """The quick checks of a run that is about to start.

    Raises:
        UserError: One is fatal, and the settings do not say `checks = "warn"`.
    """
    how = run.setup.config.checks
    if how == "skip":
        return
    found = examine_setup(run.setup, quick=True)
    if how == "refuse":
        refuse(found)
    # What differs between chat templates, and what prompts spell, is among the notes already.
    said = [one for one in found.checks if one.verdict != "ok" and one.name not in ("chat template", "prompts")]
    run.setup.notes.extend(one.line for one in said)


def assemble(*layers: Mapping[str, Any], own: Method | None = None) -> configuration.Config:
    """The configuration of a run: the built-in recipe beneath, if no model is named."""
    named = {key for layer in layers for key in layer}
    below = [] if named & {"student", "teacher", "data"} else [configuration.recipe("countdown")]
    data = next((layer["data"] for layer in reversed(layers) if "data" in layer), None)
    if data in configuration.BUILTIN:
        recipe = configuration.recipe(str(data))
        student = str(next((layer["student"] for layer in reversed(layers) if "student" in layer), recipe["student"]))
        if not named & {"student", "teacher"}:
            below = [recipe]
        elif student.partition(":")[0] in configuration.BUILTIN and "templates" in recipe:
            # Whatever else is chosen, the models that ship with Retort know no other words than these.
            below = [{"templates": recipe["templates"]}]
    return configuration.resolve(*below, *layers, own=own)


def folder_of(config: configuration.Config) -> Path:
    """Where a run goes: `out`, or runs/<method>-<time>, numbered if that is taken."""
    if config.out:
        return Path(config.out)
    base = Path("runs") / f"{config.method['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(path for path in taken if not path.exists())


def write_report(folder: Path) -> Path:
    """Writes `report.html` of a run."""
    from retort.report.page import build_report

    return build_report([folder], folder / "report.html")
