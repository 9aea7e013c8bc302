"""Digests of the models of a checkpoint: it holds the student, and all others must be the same again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retort.errors import UserError
from retort.models.adapter import described
from retort.models.lm import LanguageModel
from retort.train.teaching.teachers import Teachers


def digests(teachers: Teachers) -> dict[str, Any]:
    """Fingerprints of the models that do not learn, by name, and of the student that teaches it: part of a state."""
    return {
        "models": {name: lm.digest() for name, lm in teachers.lms.items()},
        "remote": {name: remote.scores for name, remote in teachers.remote.items()},
        "start": teachers.start,
    }


def refuse_others(path: Path, state: Mapping[str, Any], teachers: Teachers, student: LanguageModel) -> None:
    """Raises `UserError` unless a checkpoint's models are those of the run that goes on from it."""
    if state["precision"] != student.precision:  # Precision comes first: it changes the teacher's weights, too.
        raise UserError(
            f"{path}: it was made with precision = {state['precision']}, not {student.precision}; put precision back"
            " in the run's config.json"
        )
    now, then = digests(teachers), state["models"]
    for name in dict.fromkeys((*now["models"], *then)):
        if then.get(name) != now["models"].get(name):
            role = "base model" if name == "base" else name
            raise UserError(f"{path}: the {role}'s weights changed since this checkpoint; put the same {name} back")
    for name, scores in state["remote"].items():
        if name in teachers.remote:  # one whose folder is here now was compared above
            try:
                teachers.remote[name].verify(teachers.tolerance, scores)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
    if state["start"] != now["start"]:
        raise UserError(
            f"{path}: the weights in {student.name} changed since this checkpoint, and the teacher is the "
            "student as it was before training; put the same student back"
        )


def adapter_state(student: LanguageModel) -> dict[str, Any]:
    """The state of a student's adapter that is not saved and must be the same again; empty without one."""
    if student.adapter is None:
        return {}
    return {"lora": student.adapter.settings, "adapted": student.bare().digest()}


def refuse_other_adapter(path: Path, state: Mapping[str, Any], student: LanguageModel) -> None:
    """Refuses a checkpoint of another adapter than the student's, or of one on other weights.

    Raises:
        UserError: The adapter differs; the message says how to go on.
    """
    saved, own = state.get("lora"), student.adapter.settings if student.adapter else None
    if saved != own:
        raise UserError(
            f"{path}: the student learnt {described(saved)}, and would go on {described(own)}; put lora back as it was"
        )
    if student.adapter is not None and state["adapted"] != student.bare().digest():
        raise UserError(
            f"{path}: the weights of {student.name}, on which the adapter learns, changed since this checkpoint; "
            "put the same student back"
        )
