"""Environments by name: those that Retort knows, and your own as `module:name`. None is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from retort.envs.base import Environment
from retort.envs.text import TextEpisodes
from retort.errors import UserError, did_you_mean

__all__ = ["ENVIRONMENTS", "Known", "load", "refuse_unknown"]

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Known:
    """An environment that Retort knows.

    Attributes:
        summary: What it is, in one sentence.
        where: Its class, as `module:name`.
        package: The package that it needs; empty if none.
        extra: The extra of Retort that installs it.
    """

    summary: str
    where: str
    package: str = ""
    extra: str = ""

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None


#: By name, as in the setting `rollout.env`.
ENVIRONMENTS: Mapping[str, Known] = {
    "rooms": Known(
        "Rooms, the built-in text game: find a key, open a door of its colour, enter the goal",
        "retort.tasks.rooms:Rooms",
    ),
}


def refuse_unknown(name: str) -> None:
    """Raises `UserError` where a name is neither an environment's nor `module:name`."""
    if name not in ENVIRONMENTS and not _OWN.fullmatch(name):
        raise UserError(
            f"there is no environment '{name[:100]}', and it is no module:name; {did_you_mean(name, ENVIRONMENTS)}"
        )


def load(name: str, *, tools: bool = False) -> Environment:
    """Makes an environment.

    Args:
        name: One of `ENVIRONMENTS`, or `module:name` of a class with `reset` and `step`, of a function without
            arguments that returns such an object, or of an object with `begin_group`. Also the current folder is
            searched for the module, after all others.
        tools: Offer its tools to the chat template.

    Raises:
        UserError: Unknown, not installed, or it cannot be imported.
    """
    refuse_unknown(name)
    known = ENVIRONMENTS.get(name)
    if known is not None and not known.installed:
        raise UserError(
            f"the environment '{name}' needs the package '{known.package}'; install it with "
            f"pip install 'retort-distill[{known.extra}]'"
        )
    made = _imported(name if known is None else known.where, name)
    if callable(getattr(made, "begin_group", None)) and not isinstance(made, type):
        return made
    if not callable(made):
        raise UserError(
            f"rollout.env = {name}: that is a {type(made).__name__}; name a class with reset and step, or a function "
            "that makes such an object"
        )
    make: Callable[[], Any] = made
    return TextEpisodes(make, name, tools=tools)


def _imported(where: str, name: str) -> Any:
    module, _, attribute = where.partition(":")
    if os.getcwd() not in sys.path:  # permanently: modules that it imports when called lie there, too
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"rollout.env = {name}: importing it raised {type(error).__name__}: {words}") from error
    return found
