"""Checks the arguments of `retort.distill` and `retort.doctor` that are not objects, and turns them into settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from retort import registry
from retort.config.sections import SHORTHANDS, refuse_name
from retort.errors import UserError, quoted
from retort.method import Method

__all__ = [
    "method_argument",
    "models_argument",
    "path_argument",
    "refuse_twice",
    "settings_argument",
    "teachers_argument",
]

#: Settings whose argument has another name.
_ARGUMENTS = {"task": "verifier", "eval.data": "eval_data"}


def method_argument(method: Any) -> tuple[Mapping[str, Any] | None, Method | None]:
    """Returns a method as settings, or as the object that was given.

    Args:
        method: A name, a mapping, a `Method`, or None for absent.

    Raises:
        UserError: The method is of another kind.
    """
    if method is None or isinstance(method, Method):
        return None, method
    if isinstance(method, str):
        return {"name": method}, None
    if isinstance(method, Mapping):
        return method, None
    called = "; call it, and give what it returns" if callable(method) else ""
    raise UserError(
        f"method = {quoted(method)}: give a name, a mapping with name and settings, or a retort.Method{called}"
    )


def settings_argument(settings: Any) -> Mapping[str, Any]:
    """Returns the further settings; an empty mapping where they are absent.

    Raises:
        UserError: The settings are not a mapping.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise UserError(
            f"settings = {quoted(settings)}: give a mapping, nested as in a TOML file, such as "
            '{"optimizer": {"learning_rate": 1e-5}}'
        )
    for name in settings:
        if not isinstance(name, str):
            raise UserError(f"settings: {quoted(name)} is no name of a setting; names are text")
    return settings


def path_argument(argument: str, value: Any) -> str | None:
    """Returns a path or a name as text; None for absent.

    Raises:
        UserError: The value is not a path, or is empty.
    """
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{argument} = {quoted(value)}: give a path or a name, as text or a Path")
    return path


def models_argument(models: Any, besides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns models by name as settings: a path, a name or an object for each.

    Args:
        models: A mapping by name, or None for absent.
        besides: The arguments that name a model of their own.

    Raises:
        UserError: Models are not a mapping, a name is not valid, or a model is given by its own argument, too.
    """
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise UserError(f'models = {quoted(models)}: give a mapping by name, such as {{"critic": "folder"}}')
    for name, model in models.items():
        refuse_name(name)
        if model is None:
            raise UserError(f"models: {name} is None; give a folder, a hub name or a pair (model, tokenizer)")
        if name in SHORTHANDS and besides.get(name) is not None:
            raise UserError(f"{name} is given twice, as an argument and in models; leave one of them out")
    return {name if name in SHORTHANDS else f"models.{name}.path": model for name, model in models.items()}


def teachers_argument(teacher: Any, models: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Splits a teacher that is a mapping of several by name from one that is a single model.

    Args:
        teacher: The argument `teacher`.
        models: The argument `models`.

    Returns:
        A single teacher or None, all models by name, and the setting that names the teachers.

    Raises:
        UserError: A name is given in both arguments, or is that of another model.
    """
    if not isinstance(teacher, Mapping):
        return teacher, models, {}
    others = models if isinstance(models, Mapping) else {}
    for name in teacher:
        refuse_name(name)
        if name in (*others, *SHORTHANDS):
            raise UserError(f"teacher: the name '{name}' is another model's; give each of several teachers its own")
    named = {**others, **teacher} if models is None or isinstance(models, Mapping) else models
    return None, named, {"teachers.models": list(teacher)}


def refuse_twice(flags: Mapping[str, Any], own: Method | None, settings: Mapping[str, Any]) -> None:
    """Refuses what an argument and the settings say differently; what they say alike is said once.

    Args:
        flags: Arguments by the setting that each of them is.
        own: A method that was given as an object.
        settings: The settings given besides.

    Raises:
        UserError: They differ; the message shows both.
    """
    for key, value in flags.items():
        if key == "method":
            continue
        *sections, name = key.split(".")
        holder: Any = settings
        for section in sections:
            holder = holder.get(section) if isinstance(holder, Mapping) else None
        if isinstance(holder, Mapping) and name in holder and not _alike(value, holder[name]):
            raise _twice(_ARGUMENTS.get(key, key), value, holder[name])
    stated = settings.get("method")
    stated = {"name": stated} if isinstance(stated, str) else stated
    method = flags.get("method") if own is None else {"name": own.name, **own.settings}
    if not isinstance(stated, Mapping) or method is None:
        return  # what is no mapping is refused with the settings
    stated, method = (registry.spread(str(method.get("name")), one) for one in (stated, method))
    if own is not None:
        for name in stated:
            if name not in method:
                raise UserError(f"method is given as an object, which has no '{name}'; leave method out of settings")
    for name, value in stated.items():
        if name in method and not _alike(method[name], value):
            raise _twice("method" if name == "name" else f"method.{name}", method[name], value)


def _alike(one: Any, other: Any) -> bool:
    return bool(one == other) or str(one) == str(other)


def _twice(name: str, argument: Any, setting: Any) -> UserError:
    return UserError(
        f"{name} is given twice, as an argument ({quoted(argument)}) and in settings ({quoted(setting)}); "
        "leave one of them out"
    )
