"""Environments by name: those that Retort knows, and your own as `module:name`. None is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from retort.envs.base import Environment
from retort.envs.elsewhere import CALLS, Elsewhere, addresses
from retort.envs.text import TextEpisodes
from retort.envs.wired import PREFIX
from retort.errors import UserError, did_you_mean
from retort.wire import Client
from retort.wire.at_server import at_server

__all__ = ["ENVIRONMENTS", "Known", "load", "made", "makes_rows", "of_data", "refuse_unknown", "rewards", "rows_of"]

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Known:
    """An environment that Retort knows.

    Attributes:
        summary: What it is, in one sentence.
        where: Its class, as `module:name`.
        package: The package that it needs; empty if none.
        extra: The extra of Retort that installs it.
        rows: A function that makes its data, as `module:name`: from what is named behind the colon, and the number of
            the first row, it returns a name and a task for each; empty where the data are the user's.
        example: What may be named behind the colon.
        rewards: Whether it rewards its episodes; else a verifier does.
    """

    summary: str
    where: str
    package: str = ""
    extra: str = ""
    rows: str = ""
    example: str = ""
    rewards: bool = True

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def require(self, name: str) -> None:
        """Raises `UserError` where the package that it needs is not there."""
        if not self.installed:
            raise UserError(
                f"the environment '{name}' needs the package '{self.package}'; install it with "
                f"pip install 'retort-distill[{self.extra}]'"
            )


#: Rows that an environment makes, where no `limit` asks for fewer; and the number of a split's first one.
ROWS = 1000
FIRST_ROW = {"train": 0, "test": 1_000_000}

#: By name, as in the setting `rollout.env`.
ENVIRONMENTS: Mapping[str, Known] = {
    "rooms": Known(
        "Rooms, the built-in text game: find a key, open a door of its colour, enter the goal",
        "retort.tasks.rooms:Rooms",
    ),
    "reasoning_gym": Known(
        "Problems of reasoning-gym with their graders, one turn each: --data reasoning_gym:NAME",
        "retort.envs.reasoning:ReasoningGym",
        package="reasoning_gym",
        extra="reasoning",
        rows="retort.envs.reasoning:rows",
        example="countdown",
    ),
    "textworld": Known(
        "Generated games of TextWorld, whose expert is its own plan: --data textworld:KIND",
        "retort.envs.textworld:TextWorld",
        package="textworld",
        extra="textworld",
        rows="retort.envs.textworld:rows",
        example="coin_collector-5",
    ),
    "minigrid": Known(
        "MiniGrid and BabyAI in words, whose expert is BabyAI's bot: --data minigrid:LEVEL",
        "retort.envs.grid:MiniGrid",
        package="minigrid",
        extra="minigrid",
        rows="retort.envs.grid:rows",
        example="BabyAI-GoToLocal-v0",
    ),
    "gymnasium": Known(
        "Environments of Gymnasium that are text: --data gymnasium:ID",
        "retort.envs.gym:Gymnasium",
        package="gymnasium",
        extra="gymnasium",
        rows="retort.envs.gym:rows",
        example="FrozenLake-v1",
    ),
    "verifiers": Known(
        "Environments of verifiers 0.4, driven turn by turn: --data verifiers:TASKSET",
        "retort.envs.verifiers:Verifiers",
        package="verifiers",
        extra="verifiers",
        rows="retort.envs.verifiers:rows",
        example="my_taskset",
    ),
    "python": Known(
        "A Python interpreter as a tool for any data with answers: the task's verifier grades the last turn",
        "retort.envs.python_tool:PythonTool",
        rewards=False,
    ),
}


def refuse_unknown(name: str) -> None:
    """Raises `UserError` where a name is neither an environment's, nor `module:name`, nor addresses of servers."""
    if name not in ENVIRONMENTS and not _OWN.fullmatch(name) and not addresses(name):
        raise UserError(
            f"there is no environment '{name[:100]}', and it is no module:name; {did_you_mean(name, ENVIRONMENTS)}"
        )


def _client(url: str) -> Client:
    return Client(url, concurrency=CALLS)


def load(name: str, *, tools: bool = False, client: Callable[[str], Client] = _client) -> Environment:
    """Makes an environment, or opens one that servers play.

    Args:
        name: As for `made`, or addresses of servers with commas between.
        tools: Offer its tools to the chat template.
        client: Makes what speaks to the server at an address.

    Raises:
        UserError: See `made` and `Elsewhere.at`.
    """
    refuse_unknown(name)
    there = addresses(at_server(PREFIX + name).removeprefix(PREFIX))
    return Elsewhere.at([client(url) for url in there], tools=tools) if there else made(name, tools=tools)


def made(name: str, *, tools: bool = False) -> Environment:
    """Makes an environment, which this process plays.

    Args:
        name: One of `ENVIRONMENTS`, or `module:name` of a class with `reset` and `step`, of a function without
            arguments that returns such an object, or of an object with `begin_group`. Also the current folder is
            searched for the module, after all others.
        tools: Offer its tools to the chat template.

    Raises:
        UserError: Unknown, not installed, it cannot be imported, or a server plays it.
    """
    if addresses(name):
        raise UserError(f"{name} is a server already; name an environment, which `retort envs` lists, or module:name")
    refuse_unknown(name)
    known = ENVIRONMENTS.get(name)
    if known is not None:
        known.require(name)
    found = _imported(name if known is None else known.where, name)
    if callable(getattr(found, "begin_group", None)) and not isinstance(found, type):
        return found
    if known is not None and hasattr(found, "begin_group"):
        return found(tools=tools)
    if not callable(found):
        raise UserError(
            f"rollout.env = {name}: that is a {type(found).__name__}; name a class with reset and step, or a function "
            "that makes such an object"
        )
    make: Callable[[], Any] = found
    return TextEpisodes(make, name, tools=tools)


def of_data(source: str) -> str | None:
    """The environment that data such as `textworld:simple` belong to; None for other data."""
    name = source.partition(":")[0]
    return name if source in ENVIRONMENTS or makes_rows(source) else None


def rewards(name: str, client: Callable[[str], Client] = _client) -> bool:
    """Whether an environment rewards its episodes; if not, a verifier grades them.

    Args:
        name: As for `load`, as is `client`.
        client: Makes what speaks to the server at an address.

    Raises:
        UserError: It is behind servers, which do not answer as `load` needs it.
    """
    there = addresses(name)
    if there:
        return Elsewhere.at([client(url) for url in there]).rewards
    return name not in ENVIRONMENTS or ENVIRONMENTS[name].rewards


def makes_rows(source: str) -> bool:
    """Whether an environment makes these data."""
    known = ENVIRONMENTS.get(source.partition(":")[0])
    return known is not None and bool(known.rows)


def rows_of(source: str, split: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows that an environment makes, each with its name for messages. Rows of two splits differ.

    Args:
        source: The environment's name, a colon, and what it shall make: `textworld:simple`.
        split: `train` or `test`.

    Raises:
        UserError: The environment is not installed or knows nothing of that name; or the split is another one.
    """
    name, _, wanted = source.partition(":")
    known = ENVIRONMENTS[name]
    known.require(name)
    if split not in FIRST_ROW:
        raise UserError(f"{source}: has no split '{split}'; it has train and test: set split=...")
    if not wanted:
        raise UserError(f"data '{source}': name what the environment shall make, as in '{name}:{known.example}'")
    first = FIRST_ROW[split]
    make: Callable[[str, int], Any] = _imported(known.rows, name)
    for number, row in zip(range(first, first + ROWS), make(wanted, first), strict=False):
        yield f"{source}, row {number}", row


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
