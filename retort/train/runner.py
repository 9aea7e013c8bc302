"""How a run begins: anew, from a checkpoint, or only to be looked at. What it then does is in `retort.train.run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from retort import config as configuration
from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.ranks import here, join
from retort.rewards.own import IN_MEMORY
from retort.train.events.observe import Observer, Silent
from retort.train.given.given import Given
from retort.train.run import Run
from retort.train.setup.prepare import prepare
from retort.train.storage import checkpoint
from retort.train.storage.folder import refuse_held, refuse_taken

__all__ = ["Run", "load", "resume", "start"]


def start(
    config: Config,
    folder: Path,
    observer: Observer | None = None,
    *,
    method: Method | None = None,
    given: Given | None = None,
) -> Run:
    """A new run in a folder of its own, which `Run.go` makes.

    Args:
        config: Resolved.
        folder: Of the run.
        observer: Who watches.
        method: A method of the caller's own, instead of the one that the configuration names.
        given: Objects of the caller's for which texts stand in the configuration.

    Raises:
        UserError: The folder holds a run already, cannot be written, or anything about the input is wrong.
    """
    join()
    refuse_taken(folder)
    prepared = prepare(config, method, given)
    config = prepared.config  # without a teacher that nothing asks
    # What was left to choose at the start is written down as chosen, so that a resumed run cannot choose otherwise.
    chosen = {
        "precision": prepared.student.precision,
        "attention": prepared.attention,
        "device": prepared.student.device.type,
        "steps": prepared.steps,
    }
    # So are places: a run may be resumed from another folder than it was started from.
    judged = config.eval.model_copy(update={"data": _absolute(config.eval.data)})
    kept = {**chosen, "data": _absolute(config.data), "eval": judged, "out": str(folder)}
    resolved = config.moved(lambda place: str(_absolute(place))).model_copy(update=kept)
    return Run(replace(prepared, config=resolved), folder, observer or Silent(), given=given or Given(), new=True)


def resume(
    path: Path,
    observer: Observer | None = None,
    *,
    steps: int | None = None,
    method: Method | None = None,
    given: Given | None = None,
) -> Run:
    """A run continued from its newest checkpoint (from its start, if it has none), or from the one that `path` names.

    Nothing is written before `Run.go`, which drops what was written after that checkpoint.

    Args:
        path: Folder of a run, or of one of its checkpoints.
        observer: Who watches.
        steps: A new number of steps; schedules that end with the run then end with the new one.
        method: The caller's own method, if the run was started with one.
        given: The objects that it was started with; its folder keeps the rows of data among them.

    Raises:
        UserError: No run there, another process at work in it, or a damaged checkpoint.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    join()
    folder, _ = checkpoint.find(path)
    here().first(lambda: refuse_held(folder))
    return load(path, observer, steps=steps, method=method, given=given)


def load(
    path: Path,
    observer: Observer | None = None,
    *,
    steps: int | None = None,
    method: Method | None = None,
    given: Given | None = None,
) -> Run:
    """The run of `resume` for whoever only looks at it; another process may be at work in it.

    Args:
        path: As in `resume`, as are all arguments.
        observer: As in `resume`.
        steps: As in `resume`.
        method: As in `resume`.
        given: As in `resume`.

    Raises:
        UserError: No run there, or a damaged checkpoint.
    """
    folder, chosen = checkpoint.find(path)
    config = configuration.read_json(folder / "config.json", method)
    before = config.steps or 0
    if steps is not None:
        config = config.model_copy(update={"steps": steps})
    given = (given or Given()).again(config, folder)
    if chosen is not None:
        checkpoint.verify(chosen)  # refuse a damaged one before minutes are spent on loading models
    run = Run(prepare(config, method, given), folder, observer or Silent(), given=given)
    if chosen is not None:
        run.restore(chosen)
        if steps is not None:
            said = run.rise(before)
            if said is not None:
                run.observer.note(said)
    for note in given.notes:
        run.observer.note(note)
    return run


def _absolute(place: str | None) -> str | None:
    """A local path, or a pattern of such, in full; a hub name and the built-in data as they are."""
    if place is None or place in configuration.BUILTIN:
        return place
    local = Path(place).expanduser()
    pattern = any(character in place for character in "*?[") and not place.startswith(IN_MEMORY)
    return str(local.resolve()) if local.exists() or pattern else place
