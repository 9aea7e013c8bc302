"""Checkpoints: written whole or not at all, and verified before use.

A checkpoint is a folder `step-N` with the student's fp32 weights, the optimizer, and `state.json`. One process writes
a file of each, several ranks a folder of each with files of their slices (`retort.train.storage.slices`); any number of
ranks reads both. It is written under another name, flushed to disk and renamed, so a folder of that name is always
complete; `manifest.json` holds a SHA-256 of every file, checked before anything is loaded. Random streams are keyed by
seed and step (`retort.core.random_streams`), schedules by the number of updates: so the step *is* the state of both,
and a resumed run continues bit by bit. What a method itself remembers (its controllers, completions to be replayed) is
in `parts`, where there is any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from retort.errors import RunError, UserError, quoted
from retort.files import new_folder, read_object, reason
from retort.ranks import here
from retort.train.storage.slices import Stored, save_slices

#: The format of what is written here. Raise it whenever a run could not go on from an earlier checkpoint with the
#: numbers it would have had: a tensor or a key of `state.json` is new, gone, or means something else. Checkpoints of
#: other formats are refused, so no code need know how they looked. One that names no format is of the first.
FORMAT = 3
#: Keys of `state.json` besides `step` and `format` that every checkpoint of this format has.
_KEYS = ("updates", "begun", "best", "data", "models", "remote", "start", "precision", "advised", "run", "owes_probe")
_NAME = re.compile(r"step-(\d+)$")
#: What holds tensors: files of these names that one process wrote, or folders that several ranks wrote.
_GROUPS = ("weights", "optimizer", "parts")
_SUFFIX = ".safetensors"
#: A file of a rank's slices, in the manifest.
_SLICES = re.compile(rf"({'|'.join(_GROUPS)})/shard-\d{{5}}-[\w-]+\{_SUFFIX}")


T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """The state that a run needs to go on.

    Attributes:
        step: Number of batches of rollouts done.
        weights: Master weights by name, fp32.
        optimizer: Optimizer tensors, flat, as `<index>.<name>`.
        state: Plain values: updates done, data fingerprint, choices made at the start, best score so far.
        parts: Tensors of the method's stateful parts, if it has any.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    parts: Mapping[str, Tensor] = field(default_factory=lambda: {})


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read: as `Checkpoint`, but weights and optimizer are on disk until they are asked for.

    Attributes:
        path: Its folder.
        step: See `Checkpoint`, as for all others.
        weights: Read by `fill`.
        optimizer: Read by `fill`.
        state: Plain values.
        parts: Read already in one process, and one tensor after another on several ranks.
    """

    path: Path
    step: int
    weights: Stored
    optimizer: Stored
    state: Mapping[str, Any]
    parts: Mapping[str, Tensor]

    def fill(self, group: Literal["weights", "optimizer"], targets: Mapping[str, Tensor]) -> None:
        """Reads tensors into others of the same names and shapes, of several ranks each its slices.

        Raises:
            UserError: A file cannot be read.
        """
        stored = self.weights if group == "weights" else self.optimizer
        here().each(lambda: _reading(self.path, group, lambda: stored.fill(targets)))


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder/step-N`, whole or not at all. Of several ranks all call it, with their slices of the tensors.

    Raises:
        RunError: The disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{checkpoint.step}"
    world, stack = here(), contextlib.ExitStack()

    def begun() -> Path:
        folder.mkdir(exist_ok=True)  # Parents are not made: a run's folder that is gone is not made again.
        return stack.enter_context(new_folder(target))

    def ended() -> None:
        state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        manifest = {"state.json": _digest(temporary / "state.json"), **digests}
        (temporary / "manifest.json").write_text(json.dumps(dict(sorted(manifest.items())), indent=2) + "\n")
        stack.close()

    with stack:
        temporary = world.first(lambda: _writing(target, begun))
        write = _write_whole if world.size == 1 else _save_slices
        written = world.each(lambda: _writing(target, lambda: write(temporary, checkpoint)))
        digests = {name: digest for own in written for name, digest in own.items()}
        world.first(lambda: _writing(target, ended))
    return target


def _writing(target: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except (OSError, SafetensorError) as error:
        last = newest(target.parent)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise RunError(f"cannot write {target}: {reason(error)}; {kept}") from None


def _write_whole(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes the tensors of one process; the digests of the files."""
    save_file(_distinct(checkpoint.weights), folder / "weights.safetensors")
    save_file(_distinct(checkpoint.optimizer), folder / "optimizer.safetensors")
    if checkpoint.parts:
        save_file(_distinct(checkpoint.parts), folder / "parts.safetensors")
    return {path.name: _digest(path) for path in folder.iterdir()}


def _save_slices(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes this rank's slices; the digests of its files."""
    for group in _GROUPS:
        save_slices(folder / group, getattr(checkpoint, group))
    own = folder.glob(f"*/shard-{here().rank + 1:05d}-*{_SUFFIX}")
    return {str(path.relative_to(folder)): _digest(path) for path in own}


def verify(path: Path) -> None:
    """Checks the format of a checkpoint, and every file of it; of several ranks all call it, and share the files.

    Raises:
        UserError: The checkpoint is of another format; or a file is missing, truncated or changed, and the
            message names it and the previous checkpoint.
    """

    def own() -> None:
        manifest = _manifest(path)
        _check_digest(path, "state.json", manifest)
        _check_format(path, _state(path))  # The format is checked before the other files, which may differ by format.
        names = [name for group in _files(path, manifest).values() for name in group]
        for name in names[here().rank :: here().size]:
            _check_digest(path, name, manifest)

    here().each(own)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / "manifest.json")
    except UserError:
        raise _refused(path, "manifest.json", "is missing or unreadable") from None


def _files(path: Path, manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """The files of each group of tensors, by the manifest."""
    sliced = sorted(name for name in manifest if _SLICES.fullmatch(name))
    if not sliced:
        further = {"parts": ["parts.safetensors"]} if "parts.safetensors" in manifest else {}
        return {"weights": ["weights.safetensors"], "optimizer": ["optimizer.safetensors"], **further}
    for group in _GROUPS:
        for file in (path / group).glob(f"*{_SUFFIX}"):
            if f"{group}/{file.name}" not in sliced:
                raise _refused(path, f"{group}/{file.name}", "is not in manifest.json")
    return {group: [name for name in sliced if name.startswith(f"{group}/")] for group in _GROUPS}


def _check_digest(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    file = path / name
    if not file.is_file():
        raise _refused(path, name, "is missing")
    try:
        digest = _digest(file)
    except OSError as error:
        raise _refused(path, name, f"cannot be read ({reason(error)})") from None
    if digest != manifest.get(name):
        raise _refused(path, name, "is truncated or was changed after it was written")


def _state(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / "state.json")
    except UserError as error:
        raise _refused(path, "state.json", str(error).partition(": ")[2]) from None


def _check_format(path: Path, state: Mapping[str, Any]) -> None:
    found = state.get("format", 1)
    if type(found) is int and found == FORMAT:
        return
    run = state.get("run")
    versions = run.get("versions") if isinstance(run, Mapping) else None
    version = versions.get("retort") if isinstance(versions, Mapping) else None
    writer = f" ({quoted(version, 30)})" if isinstance(version, str) else ""
    raise UserError(
        f"checkpoint refused: {path} is of format {quoted(found, 30)}, and this version of Retort goes on from format "
        f"{FORMAT} only; start the run anew with another --out, or resume it with the version of Retort that wrote it"
        f"{writer}"
    )


def load(path: Path) -> Found:
    """Reads a checkpoint after verifying it; of several ranks all call it.

    Raises:
        UserError: As `verify`.
    """
    verify(path)
    # The manifest shows that nothing changed since; the values may still make no sense.
    state = _state(path)
    odd = _odd(path, state)
    if odd is not None:
        raise _refused(path, "state.json", odd)
    del state["format"]
    files = _files(path, _manifest(path))
    weights, optimizer, parts = (_stored(path, group, files.get(group, [])) for group in _GROUPS)
    if here().size == 1:
        parts = _reading(path, "parts", lambda: dict(parts))
    return Found(path, state.pop("step"), weights, optimizer, state, parts)


def _odd(path: Path, state: Mapping[str, Any]) -> str | None:
    """The fault in a checkpoint's plain values; None if there is none."""
    absent = next((name for name in _KEYS if name not in state), None)
    if absent is not None or ("lora" in state) != ("adapted" in state):
        return f"lacks its '{absent or 'lora'}'"
    updates, begun, best = state["updates"], state["begun"], state["best"]
    if type(state.get("step")) is not int or state["step"] != _step(path):
        return "names another step than its folder"
    if type(updates) is not int or updates < 0 or type(begun) is not int:
        return "does not say how many updates were made"
    paired = isinstance(best, list) and len(best) == 2 and isinstance(best[0], int | float) and type(best[1]) is int
    if best is not None and not paired:
        return "holds a best score that is none"
    advised, run = state["advised"], state["run"]
    if not isinstance(advised, list) or not all(isinstance(name, str) for name in advised):
        return "does not say which advice was given"
    if type(state["owes_probe"]) is not bool:
        return "does not say whether a probe is owed"
    if not isinstance(state["models"], Mapping):
        return "does not say which models it was made with"
    parts = [run.get(name) for name in ("settings", "digests", "versions")] if isinstance(run, Mapping) else [None]
    whole = all(isinstance(part, Mapping) for part in parts) and isinstance(state["data"], str)
    return None if whole else "lacks the digests of its run"


def _stored(path: Path, group: str, names: Sequence[str]) -> Stored:
    return _reading(path, names[0] if len(names) == 1 else group, lambda: Stored([path / own for own in names]))


def _reading(path: Path, name: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except (OSError, SafetensorError, ValueError) as error:
        raise _refused(path, name, f"cannot be read ({reason(error)})") from None


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step."""
    return max(_all(folder), key=_step, default=None)


def find(path: Path) -> tuple[Path, Path | None]:
    """The folder and the checkpoint meant by `--resume PATH` (a run: its newest, if it has any; or one checkpoint).

    Raises:
        UserError: There is no such checkpoint, or no run.
    """
    path = path.resolve()
    if _NAME.search(path.name) and path.parent.name == "checkpoints":
        if not path.is_dir():
            there = ", ".join(p.name for p in sorted(_all(path.parent), key=_step)) or "none"
            raise UserError(f"{path}: no such checkpoint (there: {there})")
        return path.parents[1], path
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no run to resume; --resume takes the folder of a run, or one of its checkpoints")
    return path, newest(path / "checkpoints")


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Removes all but the `keep` newest checkpoints and the best one."""
    found = sorted(_all(folder), key=_step)
    for path in found[:-keep]:
        if _step(path) != best:
            shutil.rmtree(path, ignore_errors=True)  # A checkpoint that cannot be removed takes room and does no harm.


def supersede(folder: Path, step: int) -> None:
    """Sets aside checkpoints later than the step that a run goes back to: they belong to another course of it."""
    for path in _all(folder):
        if _step(path) > step:
            aside = folder / "superseded" / path.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, spread over ranks as its parameters are."""
    states: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).detach()
        for index, state in states.items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, found: Found) -> None:
    """Restores `optimizer_tensors`, spread as the optimizer's parameters are.

    Raises:
        UserError: A file cannot be read, or the tensors are of an optimizer of another model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for name, shape in found.optimizer.shapes.items():
        index, _, field = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters) or shape not in ((), parameters[int(index)].shape):
            raise _refused(found.path, "optimizer", f"holds '{name}', which is of no weight of this model")
        targets[name] = found.optimizer.empty(name, parameters[int(index)])
        states.setdefault(int(index), {})[field] = targets[name]
    found.fill("optimizer", targets)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _all(folder: Path) -> Iterable[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _refused(path: Path, name: str, what: str) -> UserError:
    older = [other for other in _all(path.parent) if _step(other) < _step(path)]
    previous = max(older, key=_step, default=None)
    remedy = f"resume from the one before it: --resume {previous}" if previous else "there is no earlier checkpoint"
    return UserError(f"checkpoint refused: {path / name} {what}; {remedy}")


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
