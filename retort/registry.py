"""Finding methods by name: the method `x` is the function `x` in `retort/methods/x.py`, and nothing else lists it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import retort.methods
from retort.errors import UserError, did_you_mean, quoted
from retort.method import Method, refuse_truth

_ARGUMENT = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def names() -> list[str]:
    """Names of all published methods, sorted."""
    found = pkgutil.iter_modules(retort.methods.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


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
    """Descriptions of a method's settings from its docstring's `Args:`, one line each."""
    text = inspect.getdoc(builder(name)) or ""
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    names = list(_ARGUMENT.finditer(arguments))
    ends = [found.start() for found in names[1:]] + [len(arguments)]
    return {found[1]: " ".join(arguments[found.end() : end].split()) for found, end in zip(names, ends, strict=True)}


def load(name: str, **settings: Any) -> Method:
    """Makes a published method, with the paper's defaults unless `settings` say otherwise.

    Raises:
        UserError: Unknown method or setting (with the nearest known one), or a value of the wrong type.
    """
    from pydantic import ConfigDict, ValidationError, validate_call

    build = builder(name)
    for key in settings:
        if key not in defaults(name):
            raise UserError(f"method '{name}' has no setting '{key}'; {did_you_mean(key, defaults(name))}")
    refuse_truth(build, settings)
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(build)(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"method.{where}: {first['msg']} (it is {quoted(first['input'])})") from None
