"""Which models a run is about, and pairs of them that leave nothing to learn."""

from __future__ import annotations

from pathlib import Path

import torch

from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.models.lm import LanguageModel


def base_name(config: Config, method: Method, student: str, teacher: str) -> str | None:
    """The second frozen model's name, where the method has a view of one."""
    if not any(view.model == "base" for view in method.views.values()):
        if config.base is not None:
            raise UserError(
                f"base = {config.base} is given, but method '{method.name}' with these settings asks no base model "
                "anything; leave it out, or choose a method with a view `base` (see `retort methods`)"
            )
        return None
    if config.base is not None and _known(config.base) == _known(teacher):
        raise same_base(method)
    return config.base or student


def same_base(method: Method) -> UserError:
    """What is said where base and teacher are one model."""
    return UserError(
        f"base and teacher are the same model, so nothing that '{method.name}' asks of the base would change anything; "
        "choose another base, or leave it out for the student as it was before training"
    )


def _known(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def refuse_same_name(method: Method, student: str, teacher: str) -> None:
    """Raises `UserError` if student and teacher are named alike and see the same."""
    if _known(student) == _known(teacher) and _only_same_prompt(method):
        raise _nothing_to_learn(method, "are the same model")


def refuse_same_weights(method: Method, student: LanguageModel, teacher: LanguageModel) -> None:
    """Raises `UserError` if student and teacher hold the same weights and see the same."""
    ours, theirs = student.weights(), teacher.weights()
    if not _only_same_prompt(method) or [p.shape for p in ours.values()] != [p.shape for p in theirs.values()]:
        return
    if all(torch.equal(p.detach().to(q.dtype), q) for p, q in zip(ours.values(), theirs.values(), strict=True)):
        raise _nothing_to_learn(method, "hold the same weights")


def _only_same_prompt(method: Method) -> bool:
    return all(view.render is None for view in method.views.values())


def _nothing_to_learn(method: Method, how: str) -> UserError:
    return UserError(
        f"student and teacher {how} and see the same prompt: '{method.name}' would have nothing to learn; "
        "choose another teacher"
    )
