"""What the servers of a run serve that Ray places: its teacher, and its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retort.cluster.served import EnvironmentServer, Served, Teacher
from retort.config import Config
from retort.envs.wired import PREFIX

#: Settings of `retort serve` that a run has, too.
_SETTINGS = ("precision", "device", "attention", "threads", "trust_remote_code", "weights")


@dataclass(frozen=True)
class Service:
    """What one kind of server serves.

    Attributes:
        role: The kind, as actors are named.
        actor: The class of its actors.
        given: What is served, as the argument of `retort serve`.
        words: Settings of `retort serve`, as `key=value`.
        names: What ranks look for at these servers.
        shared: Whether a rank speaks to all of them; else each to one.
    """

    role: Literal["teacher", "environment"]
    actor: type[Served]
    given: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    shared: bool


def services(config: Config) -> list[Service]:
    """What each server of a run serves, one after another: those of the teacher first."""
    return [
        *[_teacher(config) for _ in range(config.cluster.teachers)],
        *[_environment(config) for _ in range(config.cluster.environments)],
    ]


def addresses_of(found: Sequence[tuple[Service, str]], rank: int) -> dict[str, str]:
    """The address, or the addresses, of what a rank looks for at servers.

    Args:
        found: What is served, and where.
        rank: Number of the rank.
    """
    named: dict[str, list[str]] = {}
    shared: Mapping[str, bool] = {name: own.shared for own, _ in found for name in own.names}
    for own, address in found:
        for name in own.names:
            named.setdefault(name, []).append(address)
    return {name: ",".join(all_) if shared[name] else all_[rank % len(all_)] for name, all_ in named.items()}


def _teacher(config: Config) -> Service:
    threads = config.model_copy(update={"threads": config.threads or config.cluster.teacher_cpus})
    words = tuple(f"{name}={_word(threads.value(name))}" for name in _SETTINGS if threads.value(name) is not None)
    path = str(config.teacher)
    return Service("teacher", Teacher, path, words, tuple(dict.fromkeys((path, str(Path(path).resolve())))), False)


def _environment(config: Config) -> Service:
    given = f"{PREFIX}{config.environment}"
    return Service("environment", EnvironmentServer, given, (), (given,), True)


def _word(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
