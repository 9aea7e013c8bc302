"""Methods that wrap another one: making the inner one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

import retort.methods
from retort.errors import UserError, did_you_mean
from retort.method import Method, groups_of


def inner(name: str, settings: Mapping[str, Any] | None, *, outer: str) -> Method:
    """The method that another one wraps.

    Args:
        name: Name of the wrapped method.
        settings: Settings of the wrapped method.
        outer: Name of the wrapping method, for messages.

    Raises:
        UserError: No such method, one that wraps itself, a setting that it does not have or of the wrong type.
    """
    from pydantic import ConfigDict, ValidationError, validate_call

    known = [module.name for module in pkgutil.iter_modules(retort.methods.__path__) if module.name[0] != "_"]
    known = sorted(other for other in known if other != outer)
    if name not in known:
        raise UserError(f"method.of: '{outer}' cannot wrap '{name}'; {did_you_mean(name, known)}")
    build = getattr(importlib.import_module(f"retort.methods.{name}"), name)
    single = groups_of(build).spread(settings or {})
    for key in single:
        if key not in inspect.signature(build).parameters:
            names = inspect.signature(build).parameters
            raise UserError(f"method.settings: '{name}' has no setting '{key}'; {did_you_mean(key, names)}")
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(build)(**single)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"method.settings.{where}: {first['msg']} (it is {first['input']!r})") from None
