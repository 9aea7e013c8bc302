"""`retort.distill`: a whole run in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort import config as configuration
from retort.config.precedence import flat
from retort.config.resumed import CHANGED
from retort.config.sections import shorthands
from retort.console.progress import quiet_bars, watching
from retort.errors import UserError
from retort.method import Method
from retort.preflight.doctor import examine, examine_setup, refuse
from retort.preflight.findings import Examination
from retort.ranks import here, join
from retort.rewards.user import UserGrading
from retort.train import runner
from retort.train.events.hooks import check_callbacks
from retort.train.events.observe import Observer
from retort.train.given.arguments import (
    method_argument,
    models_argument,
    path_argument,
    refuse_twice,
    settings_argument,
    teachers_argument,
)
from retort.train.given.given import CallerObjects, collect
from retort.train.output.text import TextOutput
from retort.train.setup.default_method import default_method
from retort.train.surroundings import ordinary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retort.flows.base import VelocityModel

    #: A folder, a hub name, a model with its tokenizer, or a flow model.
    Model = str | os.PathLike[str] | tuple[PreTrainedModel, PreTrainedTokenizerBase] | VelocityModel
    #: A file, a hub name, or rows: a list of dicts, a `datasets.Dataset`, any iterable of mappings.
    Data = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def distill(
    *,
    student: Model | None = None,
    teacher: Model | Mapping[str, Model] | None = None,
    base: Model | None = None,
    models: Mapping[str, Model] | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    method: str | Method | Mapping[str, Any] | None = None,
    verifier: UserGrading | str | None = None,
    out: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    resume: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
    quiet: bool = False,
) -> runner.Run:
    """Distils a teacher into a student, on-policy. Without models and data it runs the built-in task.

    Args:
        student: Model folder, hub name, a pair `(model, tokenizer)` of transformers, or a `retort.flows.VelocityModel`
            (docs/flow.md). A model of yours is not changed: a copy of it learns, which is `run.student.model` (of a
            flow `run.student.of`), and in `run.folder / "model"`.
        teacher: The same; not for methods in which the student teaches itself. Or several by name, such as
            `{"maths": ..., "code": ...}`, which teach together as the settings
            `teachers` say (docs/several-teachers.md).
        base: The same, of a second frozen model, for methods that ask one; by default the student as it was before
            training.
        models: The same, of further frozen models by name, for methods of your own whose views name them.
        data: A file, a folder, a glob or a hub name (docs/data.md); or rows: a list of dicts, a `datasets.Dataset`, any
            iterable of mappings. Columns `prompt` or `messages`, `answer`, ... Rows are kept in the run's folder.
        eval_data: The same, to evaluate on; by default prompts held out of the data.
        method: A name, a mapping with `name` and settings, or a `Method`, also one of your own.
        verifier: The grader: a function of a prompt (`retort.types.Prompt`) and a completion (text) that returns a
            number from 0 to 1 or a `retort.Grade`; or an object with a method `grade(group)` that grades all rollouts
            to a prompt at once; or `"module:name"` of one; or the name of one of Retort's (`"math"`, `"exact"`). By
            default mathematics, where the data has answers. The setting `task` is the same.
        out: Folder of the run; by default `runs/<method>-<time>`.
        steps: Batches of rollouts; by default once through the data.
        seed: Seed of all random streams.
        settings: Further settings, nested as in a TOML file, e.g. `{"optimizer": {"learning_rate": 1e-5}}`. A
            setting that contradicts an argument is refused.
        callbacks: Objects with methods of `retort.Callback`, called in this order.
        resume: Folder of a run to go on with, or one of its checkpoints; then only `steps` may be given besides, a
            higher budget (`settings={"judge": {"budget_calls": 500}}`), other workers, callbacks, and again what was an
            object before: `method`, models, `verifier`.
        observer: Receives progress, notes and tables, instead of what is printed by default.
        quiet: Print nothing. By default a run says on standard error what it does, in a notebook below the cell.

    What torch was set to (`no_grad`, `autocast`, a default dtype or device) does not reach into the run.

    Returns:
        The finished run: `.folder`, `.results` (the before/after table), `.metrics` (a row for each step), `.student`.

    Raises:
        UserError: Anything about the input is wrong; one line says what and what to do.
        RunError: The run had to stop; it names the checkpoint to go on from.
    """
    check_callbacks(callbacks)
    more, (named, own), path = settings_argument(settings), method_argument(method), path_argument("resume", resume)
    teacher, models, several = teachers_argument(teacher, models)
    objects = {"student": student, "teacher": teacher, "base": base, "data": data, "eval.data": eval_data}
    objects |= models_argument(models, objects)
    flags, caller_objects = collect(objects, more, verifier)
    flags |= several if path is None else {}
    flags |= _present(method=named, out=path_argument("out", out), steps=steps, seed=seed)
    join()
    with ordinary(), watching(observer, quiet=quiet) as watcher, quiet_bars():
        if path is not None:
            changed = flat(more)
            _only_objects(flags, caller_objects, set(changed) - set(CHANGED))
            given = {"steps": steps, "changed": changed, "method": own, "caller_objects": caller_objects}
            run = runner.resume(Path(path), watcher, **given)
        else:
            config = _assembled(flags, more, own, caller_objects)
            run = runner.start(config, folder_of(config), watcher, method=own, caller_objects=caller_objects)
            check(run)
        run.callbacks = tuple(callbacks)
        run.go()
        if run.world.leads:
            write_report(run.folder)
    return run


def doctor(
    *,
    student: Model | None = None,
    teacher: Model | Mapping[str, Model] | None = None,
    base: Model | None = None,
    models: Mapping[str, Model] | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    method: str | Method | Mapping[str, Any] | None = None,
    verifier: UserGrading | str | None = None,
    settings: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Examination:
    """Checks a pair before any time is spent on it: what `retort doctor` prints. Nothing is trained or written.

    Args:
        student: As in `distill`, as are all arguments not named here.
        teacher: As in `distill`.
        base: As in `distill`.
        models: As in `distill`.
        data: As in `distill`.
        eval_data: As in `distill`.
        method: As in `distill`.
        verifier: As in `distill`.
        settings: As in `distill`.
        quick: Leave out the checks that generate; these are the ones that `distill` makes.

    Returns:
        `.verdict` (ok, warn or fatal) and `.checks`: what each saw, why it matters, what to do.

    Raises:
        UserError: A setting that does not exist or has the wrong type. What is wrong with models and data is a finding.
    """
    more, (named, own) = settings_argument(settings), method_argument(method)
    teacher, models, several = teachers_argument(teacher, models)
    objects = {"student": student, "teacher": teacher, "base": base, "data": data, "eval.data": eval_data}
    objects |= models_argument(models, objects)
    flags, caller_objects = collect(objects, more, verifier)
    config = _assembled(flags | several | _present(method=named), more, own, caller_objects)
    with ordinary(), quiet_bars():
        return examine(config, own, quick=quick, caller_objects=caller_objects)


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _assembled(
    flags: Mapping[str, Any], settings: Mapping[str, Any], own: Method | None, caller_objects: CallerObjects
) -> configuration.Config:
    """Builds the configuration from arguments and settings.

    Raises:
        UserError: An argument and a setting contradict each other.
    """
    settings = shorthands(settings)
    refuse_twice(flags, own, settings)
    nested: dict[str, Any] = {}
    for key, value in flags.items():
        *sections, name = key.split(".")
        holder = nested
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return assemble(nested, settings, own=own, caller_objects=caller_objects)


def _only_objects(flags: Mapping[str, Any], caller_objects: CallerObjects, settings: Collection[str]) -> None:
    """Raises `UserError` where a run that is resumed is given settings."""
    objects = {*(text for text in caller_objects.models), *(rows.label for rows in caller_objects.rows.values())}
    others = [key for key, value in flags.items() if key != "steps" and str(value) not in objects]
    if caller_objects.grade is not None:
        others = [key for key in others if key != "task"]
    if others or settings:
        raise UserError(
            "resume goes on with the settings of the run; only steps may be given besides, a budget "
            "(judge.budget_calls, _tokens or _money), rollout.workers, and again what was given as an object "
            f"({(others or ['settings'])[0]} is neither)"
        )


#: Checks whose findings are among the notes of a run already.
_NOTED = ("chat template", "prompts")


def check(run: runner.Run) -> None:
    """Makes the quick checks of a run that is about to start.

    Raises:
        UserError: One is fatal, and the settings do not say `checks = "warn"`.
    """
    how = run.prepared.config.checks
    if how == "skip" or not isinstance(run.output, TextOutput):
        return
    found = examine_setup(run.output.prepared, quick=True)
    if how == "refuse":
        refuse(found)
    # What differs between chat templates, and what prompts spell, is among the notes already.
    findings = [one for one in found.checks if one.verdict != "ok" and one.name.partition(" of ")[0] not in _NOTED]
    run.prepared.notes.extend(one.line for one in findings)


def assemble(
    *layers: Mapping[str, Any], own: Method | None = None, caller_objects: CallerObjects | None = None
) -> configuration.Config:
    """Resolves the configuration of a run; without a named model, on top of the built-in recipe.

    Args:
        layers: Nested settings; later ones win.
        own: A method of the caller's own.
        caller_objects: The objects behind placeholders in the layers.

    Raises:
        UserError: See `retort.config.resolve`.
    """
    layers = tuple(shorthands(layer) for layer in layers)
    named = {key for layer in layers for key in layer}
    below = [] if named & {"student", "teacher", "data"} else [configuration.recipe("countdown")]
    data = next((layer["data"] for layer in reversed(layers) if "data" in layer), None)
    if data in configuration.BUILTIN:
        recipe = configuration.recipe(str(data))
        student = str(next((layer["student"] for layer in reversed(layers) if "student" in layer), recipe["student"]))
        if not named & {"student", "teacher"}:
            below = [recipe]
        elif student.partition(":")[0] in configuration.BUILTIN and "templates" in recipe:
            # The models that ship with Retort know no other words than these, whatever else is chosen.
            below = [{"templates": recipe["templates"]}]
    if own is None:
        below.append(default_method(layers, caller_objects or CallerObjects()))
    return configuration.resolve(*below, *layers, own=own)


def folder_of(config: configuration.Config) -> Path:
    """The folder of a new run: `out`, or runs/<method>-<time>, numbered if that is taken."""
    if config.out:
        return Path(config.out)
    return here().first(lambda: _free_folder(config))


def _free_folder(config: configuration.Config) -> Path:
    base = Path("runs") / f"{config.method['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(path for path in taken if not path.exists())


def write_report(folder: Path) -> Path:
    """Writes `report.html` of a run."""
    from retort.report.page import build_report

    return build_report([folder], folder / "report.html")
