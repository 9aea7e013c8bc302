"""The identity of a run in a checkpoint: settings, digests and versions, so that a resumed run notices changes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from retort.config import Config
from retort.config.sections import SHORTHANDS
from retort.core.rollouts import Prompt
from retort.core.sequences import TokenSequence
from retort.data import fingerprint
from retort.errors import UserError
from retort.method import Method
from retort.models.fingerprint import digests_of
from retort.teachers.reader import Reader
from retort.train.setup.prepare import Prepared

#: Settings that do not change what is learnt or evaluated; paths, because their content counts.
FREE = (
    *(*SHORTHANDS, "models", "data", "eval.data", "out"),
    *("steps", "tracker", "checks", "checkpoint", "record", "server", "cache", "cluster"),
    # Whose answers count is in the record of them; the form of the questions is not free.
    *(f"judge.{name}" for name in ("model", "name", "key", "timeout", "patience", "requests", "replay")),
    *("judge.budget_calls", "judge.budget_tokens", "judge.budget_money", "judge.price_prompt"),
    "judge.price_completion",
    *("rollout.vllm_python", "rollout.vllm_options", "rollout.noise_bound", "rollout.worker_timeout"),
)
#: Settings that change rounding at most.
ROUNDING = (
    "device",
    "attention",
    "threads",
    "rollout.parallel",
    "rollout.workers",
    "optimizer.batch_tokens",
    "optimizer.gradient_checkpointing",
)
#: Digests that may differ between versions of transformers.
_BY_VERSION = ("configuration", "tokenizer")


def identity(prepared: Prepared) -> dict[str, Any]:
    """Computes the identity of a run before its student has learnt: part of a checkpoint's state.

    Weights are hashed whole (about a second per gigabyte), and prompts as each model reads them.
    """
    digests: dict[str, str] = {}
    for role, lm in prepared.lms.items():
        digests |= {f"the {role}'s {what}": digest for what, digest in digests_of(lm).items()}
    readers = {"student": prepared.source.render}
    readers |= {role: model.render for role, model in prepared.teachers.models.items() if isinstance(model, Reader)}
    for role, render in readers.items():
        digests[f"the prompts as the {role} reads them"] = _rendered(
            [*prepared.source.prompts, *prepared.held_out], render
        )
    digests["the held-out prompts"] = fingerprint([*prepared.held_out, *prepared.source.probe])
    settings = settings_of(prepared.config, prepared.method)
    return {"settings": settings, "digests": digests, "versions": versions_now()}


def versions_now() -> dict[str, str]:
    """Versions of what a run computes with."""
    import transformers

    import retort

    return {
        "retort": retort.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def compare(
    path: Path, state: Mapping[str, Any], now: Mapping[str, Any], folder: Path, note: Callable[[str], None]
) -> None:
    """Refuses a checkpoint of another run, and notes what differs without changing what is learnt.

    Args:
        path: Path of the checkpoint, for messages.
        state: Plain values of the checkpoint.
        now: The `identity` of the run.
        folder: The folder of the run.
        note: Called with a sentence for each difference that may only change rounding.

    Raises:
        UserError: Something differs that makes it another run.
    """
    then = state["run"]
    settings = [
        (name, then["settings"][name], value)
        for name, value in now["settings"].items()
        if name in then["settings"] and json.loads(then["settings"][name]) != json.loads(value)
    ]
    other = [(name, a, b) for name, a, b in settings if name not in ROUNDING]
    if other:
        shown = ", ".join(f"{name} = {b} (it was {a})" for name, a, b in other[:4])
        raise UserError(
            f"{path}: these settings changed since this checkpoint: {shown}; put them back in "
            f"{folder / 'config.json'}, or start a new run with another --out"
        )
    versions = [
        f"{name} {now['versions'][name]} (it was {was})"
        for name, was in then["versions"].items()
        if name in now["versions"] and now["versions"][name] != was
    ]
    upgraded = then["versions"].get("transformers") != now["versions"]["transformers"]
    changed = [name for name, digest in now["digests"].items() if then["digests"].get(name) != digest]
    may_render_differently = [name for name in changed if upgraded and name.endswith(_BY_VERSION)]
    refused = [name for name in changed if name not in may_render_differently]
    if refused:
        raise UserError(
            f"{path}: {' and '.join(refused[:4])} changed since this checkpoint{_why(refused)}; "
            "put back what it was made with, or start a new run with another --out"
        )
    notes = [f"{name} = {b} now (it was {a})" for name, a, b in settings]
    notes += [f"{name} is rendered differently by this version" for name in may_render_differently]
    if versions:
        notes.append(f"the run goes on with {', '.join(versions)}")
    for found in notes:
        note(f"{found}: results may round differently from here on")


def _why(refused: list[str]) -> str:
    if all(name.startswith("the prompts as") for name in refused):
        return (
            " (a chat template that writes today's date does this: write the day of the first start into "
            "rollout.date in the run's config.json)"
        )
    if refused[0] == "the student's weights":
        return " (is it a checkpoint of another run?)"
    return ""


def settings_of(config: Config, method: Method) -> dict[str, str]:
    """Settings that count, as JSON by dotted name, including the numbers of the caller's own method."""
    plain = {name: v for name, v in method.settings.items() if isinstance(v, (bool, int, float, str, type(None)))}
    found = dict(_flat(config.model_dump())) | {
        f"method {name}": json.dumps(value) for name, value in {"name": method.name, **plain}.items()
    }
    return {name: value for name, value in found.items() if not _belongs_to(name, FREE)}


def _belongs_to(name: str, names: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value, default=str)


def _rendered(prompts: Iterable[Prompt], render: Callable[[Prompt], TokenSequence]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        context = render(prompt)
        found.update(f"{context.ids}\n".encode())
        for own in context.media:  # a line of text alone stays as it is
            found.update(f"{own.digest} {own.position}\n".encode())
    return found.hexdigest()
