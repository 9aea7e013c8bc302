"""What a checkpoint says of its run besides tensors, and whether a run may go on from one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from retort.data import fingerprint
from retort.errors import UserError
from retort.train.output.identity import compare
from retort.train.setup.prepare import Prepared
from retort.train.storage.checkpoint import Found
from retort.train.teaching.digests import adapter_state, digests, refuse_other_adapter, refuse_others


def state_of(
    prepared: Prepared, best: tuple[float, int] | None, advised: Collection[str], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """The plain values of a checkpoint, without the learner's counts.

    Args:
        prepared: The run's parts.
        best: Best held-out score so far, and its step.
        advised: Advice that was given.
        identity: See `retort.train.output.identity`.
    """
    return {
        "best": best,
        "data": fingerprint(prepared.source.prompts),
        **digests(prepared.teachers),
        "precision": prepared.student.precision,
        "advised": sorted(advised),
        "run": identity,
        **adapter_state(prepared.student),
    }


def refuse_other_run(
    path: Path, found: Found, prepared: Prepared, identity: Mapping[str, Any], note: Callable[[str], None]
) -> None:
    """Refuses a checkpoint of other data, models or settings, and notes what may only change rounding.

    Args:
        path: Of the checkpoint.
        found: What it holds.
        prepared: The parts of the run that is to go on from it.
        identity: Of that run.
        note: Takes each difference that is no reason to refuse, one sentence.

    Raises:
        UserError: What differs, and what to do.
    """
    if found.state["data"] != fingerprint(prepared.source.prompts):
        raise UserError(
            f"{path}: the training data changed since this checkpoint; resume with the data it was made with"
        )
    student = prepared.student
    refuse_other_adapter(path, found.state, student)
    refuse_others(path, found.state, prepared.teachers, student)
    shapes = {name: parameter.shape for name, parameter in student.trainable().items()}
    if shapes != found.weights.shapes:
        raise UserError(f"{path}: the student {student.name} is another model than the one it was made with")
    compare(path, found.state, identity, path.parents[1], note)
