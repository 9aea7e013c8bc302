"""Finding methods by name: the method `x` is the function `x` in `retort/methods/x.py`, and nothing else lists it."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import retort.methods
from retort.core.needs import TEMPERATURE, Capability, can_meet
from retort.core.numbers import refuse_truth
from retort.core.signals import SPAN_KINDS
from retort.errors import UserError, did_you_mean, quoted
from retort.method import Method, groups_of

_ARGUMENT = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def names() -> list[str]:
    """Names of all published methods, sorted."""
    return list(_listed_in(tuple((folder, Path(folder).stat().st_mtime_ns) for folder in retort.methods.__path__)))


@functools.cache
def _listed_in(folders: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The same; the folders are read again when a file has come or gone, which changes their times."""
    found = pkgutil.iter_modules([folder for folder, _ in folders])
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def for_tokens() -> list[str]:
    """Names of the methods that a student of tokens can learn by, at their default settings, sorted.

    They are all but those that need steps which decide latents. Which ones can teach such steps is said by
    `retort.loss.latents.check_latents`; a method may do both.
    """
    return [name for name in names() if not load(name).needs_latents]


def for_two_tokenizers() -> list[str]:
    """Names of the methods that a teacher with another tokenizer can serve, at their default settings, sorted.

    Other models that they need besides the teacher (`base`) have the student's tokenizer.
    """
    return served_by(SPAN_KINDS)


def served_by(capabilities: Iterable[Capability]) -> list[str]:
    """Names of the methods that a teacher with these capabilities can serve, at their default settings, sorted."""
    able = list(capabilities)
    return [name for name in names() if _served(load(name), able)]


def _served(made: Method, capabilities: Sequence[Capability]) -> bool:
    phases = [made] if made.before is None else [made.before[1], made]
    needs = [
        need
        for phase in phases
        for name, view in phase.views.items()
        if view.model == "teacher"
        for need in phase.needs(name)
    ]
    tempered = any(phase.temperature != 1.0 for phase in phases) and not can_meet(capabilities, TEMPERATURE)
    return bool(needs) and not tempered and all(can_meet(capabilities, need) for need in needs)


def builder(name: str) -> Callable[..., Method]:
    """The function that makes a method; its signature holds the settings and their defaults.

    Raises:
        UserError: Unknown name, with the nearest one.
    """
    if name not in names():
        raise UserError(f"unknown method '{name}'; {did_you_mean(name, names())}")
    return getattr(importlib.import_module(f"retort.methods.{name}"), name)


def defaults(name: str) -> dict[str, Any]:
    """Settings of a method with their default values."""
    return {key: parameter.default for key, parameter in inspect.signature(builder(name)).parameters.items()}


def described(name: str) -> dict[str, str]:
    """What the settings of a method are, in one line each: from `Args:`, and of its groups from `Attributes:`."""
    found: dict[str, str] = {}
    groups = groups_of(builder(name))
    for argument, text in _listed(builder(name), "Args").items():
        if argument in groups.defaults:
            words = _listed(groups.defaults[argument], "Attributes")
            found |= {setting: words[field] for setting, field in groups.settings(argument).items()}
        else:
            found[argument] = text
    return found


def spread(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method, each by its own name, also those that are given in groups (`retort.core.options`).

    A name that no method has is not refused here: whoever loads it says so.

    Raises:
        UserError: A setting is given twice, or a group has no such setting.
    """
    return groups_of(builder(name)).spread(settings) if name in names() else dict(settings)


def load(name: str, **settings: Any) -> Method:
    """Makes a published method, with the paper's defaults unless `settings` say otherwise.

    Raises:
        UserError: Unknown method or setting (with the nearest known one), or a value of the wrong type.
    """
    from pydantic import ValidationError

    build, settings, known = builder(name), spread(name, settings), defaults(name)
    for key in settings:
        if key not in known:
            raise UserError(f"method '{name}' has no setting '{key}'; {did_you_mean(key, known)}")
    refuse_truth(build, settings)
    try:
        return _validated(build)(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"method.{where}: {first['msg']} (it is {quoted(first['input'])})") from None


@functools.cache
def _validated(build: Callable[..., Method]) -> Callable[..., Method]:
    """The function with its arguments checked against their types, which takes longer to make than to call."""
    from pydantic import ConfigDict, validate_call

    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(build)


def _listed(thing: object, section: str) -> dict[str, str]:
    """The entries of a section of a docstring, in one line each."""
    listed = (inspect.getdoc(thing) or "").partition(f"\n{section}:\n")[2].partition("\n\n")[0]
    names = list(_ARGUMENT.finditer(listed))
    ends = [found.start() for found in names[1:]] + [len(listed)]
    return {found[1]: " ".join(listed[found.end() : end].split()) for found, end in zip(names, ends, strict=True)}
