"""Starts, resumes or loads a run. The loop itself is in `retort.train.run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retort import config as configuration
from retort.config import Config
from retort.config.resumed import resumed
from retort.errors import UserError
from retort.method import Method
from retort.ranks import here, join
from retort.rewards.user import IN_MEMORY
from retort.train.events.observe import Observer, Silent
from retort.train.flows.output import FlowOutput
from retort.train.flows.prepare import decides_latents, prepare_flow
from retort.train.flows.settings import refuse_flow_settings
from retort.train.given.given import CallerObjects
from retort.train.output.base import Output
from retort.train.output.text import TextOutput
from retort.train.run import Run
from retort.train.setup.prepare import prepare
from retort.train.setup.stored import need_scores
from retort.train.storage import checkpoint
from retort.train.storage.folder import refuse_held, refuse_taken
from retort.wire import is_url

__all__ = ["Run", "load", "resume", "start"]


def start(
    config: Config,
    folder: Path,
    observer: Observer | None = None,
    *,
    method: Method | None = None,
    caller_objects: CallerObjects | None = None,
) -> Run:
    """Starts a new run in a folder of its own, which `Run.go` makes.

    Args:
        config: The resolved configuration.
        folder: The folder of the run.
        observer: Receives progress, notes and tables.
        method: A method of the caller's own, instead of the one that the configuration names.
        caller_objects: The objects that the configuration names by a placeholder.

    Raises:
        UserError: The folder holds a run already, cannot be written, or anything about the input is wrong.
    """
    join()
    here().first(lambda: refuse_taken(folder))  # it tries the lock, which only one process can have
    output = _made(config, method, caller_objects or CallerObjects(), starts=True)
    prepared = output.prepared
    config = prepared.config  # The resolved settings name no idle teacher.
    # Settings chosen at the start are saved as chosen, so that a resumed run cannot choose otherwise.
    chosen = {
        "precision": prepared.learner.lm.precision,
        "attention": prepared.attention,
        "device": prepared.learner.lm.device.type,
        "steps": prepared.steps,
    }
    # Paths are saved in full: a run may be resumed from another folder than it was started from.
    evaluated = config.eval.model_copy(update={"data": _absolute(config.eval.data)})
    cache = config.cache.model_copy(update={"dir": config.cache.dir and str(Path(config.cache.dir).resolve())})
    judge = config.judge.moved(lambda path: str(_absolute(path)), config.model_paths)
    kept = {
        **chosen,
        "judge": judge,
        "cache": cache,
        "data": _absolute(config.data),
        "eval": evaluated,
        "out": str(folder),
    }
    resolved = config.moved(lambda path: str(_absolute(path))).model_copy(update=kept)
    return Run(
        output.with_config(resolved),
        folder,
        observer or Silent(),
        caller_objects=caller_objects or CallerObjects(),
        new=True,
    )


def resume(
    path: Path,
    observer: Observer | None = None,
    *,
    steps: int | None = None,
    changed: Mapping[str, Any] | None = None,
    method: Method | None = None,
    caller_objects: CallerObjects | None = None,
) -> Run:
    """Continues a run from its newest checkpoint (from its start, if it has none), or from the one that `path` names.

    Nothing is written before `Run.go`, which drops what was written after that checkpoint.

    Args:
        path: The folder of a run, or of one of its checkpoints.
        observer: Receives progress, notes and tables.
        steps: A new number of steps; schedules that end with the run then end with the new one.
        changed: Settings by full name that are changed, see `retort.config.resumed.CHANGED`.
        method: The caller's own method, if the run was started with one.
        caller_objects: The objects that it was started with; its folder keeps the rows of data among them.

    Raises:
        UserError: No run there, another process at work in it, or a damaged checkpoint.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    join()
    here().first(lambda: refuse_held(checkpoint.find(path)[0]))
    return load(path, observer, steps=steps, changed=changed, method=method, caller_objects=caller_objects)


def load(
    path: Path,
    observer: Observer | None = None,
    *,
    steps: int | None = None,
    changed: Mapping[str, Any] | None = None,
    method: Method | None = None,
    caller_objects: CallerObjects | None = None,
    asks: bool = True,
) -> Run:
    """Loads a run as `resume` does, only to read it; another process may be at work in it.

    Args:
        path: As in `resume`, as are all arguments.
        observer: As in `resume`.
        steps: As in `resume`.
        changed: As in `resume`.
        method: As in `resume`.
        caller_objects: As in `resume`.
        asks: Whether its judge is asked, see `prepare`.

    Raises:
        UserError: No run there, or a damaged checkpoint.
    """
    folder, chosen = here().first(lambda: checkpoint.find(path))  # a machine may see late what another one wrote
    config = configuration.read_json(folder / "config.json", method)
    before = config.steps or 0
    if steps is not None:
        config = config.model_copy(update={"steps": steps})
    if changed:
        config = resumed(config, changed)
    caller_objects = (caller_objects or CallerObjects()).again(config, folder)
    if chosen is not None:
        checkpoint.verify(chosen)  # A damaged checkpoint is refused before minutes are spent on loading models.
    output = _made(config, method, caller_objects, asks=asks)
    run = Run(output, folder, observer or Silent(), caller_objects=caller_objects)
    if chosen is not None:
        run.restore(chosen)
        if steps is not None:
            note = run.rise(before)
            if note is not None:
                run.observer.note(note)
    for note in caller_objects.notes:
        run.observer.note(note)
    return run


def _made(
    config: Config, method: Method | None, caller_objects: CallerObjects, *, starts: bool = False, asks: bool = True
) -> Output:
    """The parts of a run, and what it leaves behind, by what its student decides; `asks` as in `prepare`.

    Args:
        config: The resolved configuration.
        method: The caller's own method, if there is one.
        caller_objects: The objects behind placeholders.
        starts: Whether the run starts anew, and is to be refused where it could not end.
        asks: Whether a judge is asked.
    """
    if decides_latents(config, method, caller_objects):
        return FlowOutput(prepare_flow(config, method, caller_objects))
    refuse_flow_settings(config)
    prepared = prepare(config, method, caller_objects, asks=asks)
    if starts:
        need_scores(prepared)
    return TextOutput(prepared)


def _absolute(path: str | None) -> str | None:
    """Makes a local path or glob absolute; hub names, addresses and built-in data stay as they are."""
    if path is None or path in configuration.BUILTIN or is_url(path):
        return path
    local = Path(path).expanduser()
    pattern = any(character in path for character in "*?[") and not path.startswith(IN_MEMORY)
    return str(local.resolve()) if local.exists() or pattern else path
