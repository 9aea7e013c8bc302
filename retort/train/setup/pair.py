"""The models of a run, and checks for pairs that leave nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from retort.config import Config, recipe
from retort.config.sections import SHORTHANDS
from retort.errors import UserError, did_you_mean
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.teachers.itself import OwnWeights
from retort.train.models.models import Frozen
from retort.train.setup.prompts import refuse_misspelt


def teacher_use(method: Method) -> str | None:
    """Describes what a run needs a teacher for; None if it needs none."""
    for phase in [method] if method.before is None else [method.before[1], method]:
        view = next((name for name, view in phase.views.items() if "teacher" in view.models), None)
        if view is not None:
            return f"view '{view}' of method '{phase.name}' is of a teacher"
        if "teacher" in phase.rollout.sources:
            return f"the answers of method '{phase.name}' are a teacher's"
    return None


def without_idle_teacher(config: Config, method: Method, *, may_generate: bool = False) -> Config:
    """Removes a teacher that nothing asks from the settings; that of a built-in task goes without a note.

    Args:
        config: The resolved configuration.
        method: The method.
        may_generate: Whether the run can have each of several teachers generate the completions of its own prompts.

    Raises:
        UserError: A teacher of the user's own would do nothing; or several of them, see `refuse_several`.
    """
    if config.teachers.models:
        refuse_several(config, method, may_generate=may_generate)
    elif config.teacher is None or teacher_use(method) is not None:
        return config
    if config.teacher is None:
        return config
    if config.builtin and config.teacher == recipe(str(config.data)).get("teacher"):
        return config.model_copy(update={"teacher": None})
    if config.teachers.models:
        raise UserError(
            f"teacher = {config.teacher} and teachers.models = {config.teachers.models} are both given; leave one out"
        )
    raise UserError(
        f"teacher = {config.teacher} is given, but method '{method.name}' teaches itself; leave it out, or choose a "
        "method that asks a teacher (see `retort methods`)"
    )


def refuse_several(config: Config, method: Method, *, may_generate: bool = False) -> None:
    """Refuses several teachers where they have no meaning.

    Args:
        config: The resolved configuration.
        method: The method.
        may_generate: As in `without_idle_teacher`.

    Raises:
        UserError: No view asks a teacher; a name is no model's; teachers would generate; or the best by reward is to be
            found of a single completion.
    """
    several, phases = config.teachers, [method] if method.before is None else [method.before[1], method]
    if not any(view.model == "teacher" for phase in phases for view in phase.views.values()):
        raise UserError(
            f"teachers.models = {several.models} are given, but method '{method.name}' asks no teacher; leave them "
            "out, or choose a method that asks one (see `retort methods`)"
        )
    for name in several.models:
        if name not in config.further_models:
            raise UserError(
                f"teachers.models names '{name}', which is no model of the run; give its folder or hub name as "
                f"models.{name}.path"
            )
    for phase in phases:
        if "teacher" in phase.rollout.sources and not may_generate:
            remedy = "cold_start.answers=dataset" if phase is not method else "method.on_policy_fraction=1"
            raise UserError(
                f"method '{phase.name}' learns from completions of a teacher, and of several (teachers.models) none is "
                f"the one that generates; set {remedy}, or give a single teacher"
            )
    if several.combine == "best" and method.rollout.samples < 2:
        raise UserError(
            "teachers.combine = best compares the rewards of a prompt's completions, and with samples = 1 there is "
            "nothing to compare; set method.samples to 2 or more, or use combine = route"
        )


def further(config: Config, method: Method) -> dict[str, str]:
    """Paths of the further models that views name, by name.

    Raises:
        UserError: A view names a model that the settings do not, or the settings one that no view names.
    """
    phases = [method] if method.before is None else [method.before[1], method]
    views = [(phase.name, name, view) for phase in phases for name, view in phase.views.items()]
    use = {model: (phase, name) for phase, name, view in views for model in view.models}
    use |= dict.fromkeys(config.teachers.models, (method.name, "teacher"))
    for model, (phase, view) in use.items():
        if model not in (*SHORTHANDS, *config.further_models):
            # A name that was given, perhaps with an error in it; teacher and base are there without being given.
            near = f" ({did_you_mean(model, list(config.further_models))})" if config.further_models else ""
            raise UserError(
                f"view '{view}' of method '{phase}' is of a model '{model}', which the run does not have{near}; "
                f"name it with models.{model}.path=DIR"
            )
    for name, path in config.further_models.items():
        if name not in use and name != config.judge.model:
            raise UserError(
                f"models.{name}.path = {path} is given, but no view of method '{method.name}' with these "
                f"settings is of a model '{name}'; leave it out, or choose a method that asks it"
            )
    return {name: path for name, path in config.further_models.items() if name in use}


def named(config: Config, method: Method) -> tuple[str, str | None, str]:
    """The paths of student, teacher and data; a teacher only where the method needs one."""
    use = teacher_use(method)
    if config.data is not None:
        refuse_misspelt(config.data)
    asked = use is not None and not config.teachers.models
    for name in ("student", "teacher", "data") if asked else ("student", "data"):
        if getattr(config, name) is None:
            given = "--student, --teacher and --data" if use else "--student and --data"
            alone = "" if use else f" (the student of method '{method.name}' teaches itself)"
            why = f" ({use})" if name == "teacher" else alone
            raise UserError(f"{name} is missing{why}: give {given} together, or none for the built-in task")
    return str(config.student), config.teacher, str(config.data)


def base_name(config: Config, method: Method, student: str, teacher: str | None) -> str | None:
    """The path of the base model, where the method has a view of one."""
    if not any("base" in view.models for view in method.views.values()):
        if config.base is not None:
            raise UserError(
                f"base = {config.base} is given, but method '{method.name}' with these settings asks no base model "
                "anything; leave it out, or choose a method with a view `base` (see `retort methods`)"
            )
        return None
    if config.base is not None and teacher is not None and _known(config.base) == _known(teacher):
        raise same_base(method)
    return config.base or student


def model_paths(config: Config, method: Method, student: str, teacher: str | None) -> dict[str, str]:
    """Paths of all models of a run by name, the student first; a base that is the student as it was has its path.

    Raises:
        UserError: Two of them are one model, and nothing would be learnt; or no view asks a model that is named.
    """
    base, others = base_name(config, method, student, teacher), further(config, method)
    if base in (None, student) and not others and teacher is not None:
        refuse_same_name(method, student, teacher)
    found = {"student": student}
    found |= {"teacher": teacher} if teacher is not None else {}
    found |= {"base": base} if base is not None else {}
    return found | others


def refuse_equal(config: Config, method: Method, student: LanguageModel, frozen: Mapping[str, Frozen]) -> None:
    """Raises `UserError` if models of other names hold the same weights, and nothing would be learnt."""
    teacher, base = frozen["teacher"], frozen.get("base")
    if (base is None or config.base in (None, config.student)) and not config.further_models:
        refuse_same_weights(method, student, teacher)
    if base is not None and base.digest() == teacher.digest():
        raise same_base(method)


def same_base(method: Method) -> UserError:
    """The error for a base and a teacher that are one model."""
    return UserError(
        f"base and teacher are the same model, so nothing that '{method.name}' asks of the base would change anything; "
        "choose another base, or leave it out for the student as it was before training"
    )


def _known(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def refuse_same_name(method: Method, student: str, teacher: str) -> None:
    """Raises `UserError` if student and teacher have the same name and see the same prompt."""
    if _known(student) == _known(teacher) and _only_same_prompt(method):
        raise _nothing_to_learn(method, "are the same model")


def refuse_same_weights(method: Method, student: LanguageModel, teacher: Frozen) -> None:
    """Raises `UserError` if student and teacher hold the same weights and see the same prompt."""
    if not isinstance(teacher, LanguageModel) or not teacher.here:
        if _only_same_prompt(method) and student.digest() == teacher.digest():
            raise _nothing_to_learn(method, "hold the same weights")
        return
    ours, theirs = student.weights(), teacher.weights()
    if not _only_same_prompt(method) or [p.shape for p in ours.values()] != [p.shape for p in theirs.values()]:
        return
    with teacher.offload.present():
        theirs = teacher.weights()
        equal = all(torch.equal(p.detach().to(q.dtype), q) for p, q in zip(ours.values(), theirs.values(), strict=True))
    if equal:
        raise _nothing_to_learn(method, "hold the same weights")


def _only_same_prompt(method: Method) -> bool:
    return all(view.render is None for view in method.views.values())


def _nothing_to_learn(method: Method, how: str) -> UserError:
    return UserError(
        f"student and teacher {how} and see the same prompt: '{method.name}' would have nothing to learn; "
        "choose another teacher"
    )


def own_weights(config: Config, method: Method, student: LanguageModel) -> OwnWeights | None:
    """The weights of the student as its own teacher, if some phase of the run asks it."""
    phases = [method] if method.before is None else [method.before[1], method]
    views = [view for phase in phases for view in phase.views.values()]
    wanted = [view.weights for view in views if view.model == "student"]
    authors = [author for view in views if view.draft is not None for author in view.draft.authors]
    wanted += [author.weights for author in authors if author.model == "student"]
    if not wanted:
        return None
    again = any(controller.again and controller.observes for phase in phases for controller in phase.controllers)
    several = config.optimizer.updates * config.optimizer.epochs > 1
    return OwnWeights(student, wanted, moves_within_batch=several or again)
