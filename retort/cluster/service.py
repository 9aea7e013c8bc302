"""What the servers of a run that Ray places are: of its teacher, of its environment, and workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retort.cluster.teacher import EnvironmentServer, Server, Teacher
from retort.cluster.worker import Worker
from retort.config import Config
from retort.envs.wired import PREFIX
from retort.wire.at_server import VARIABLE
from retort.wire.workers import ADDRESSES, KEY

#: Settings of `retort serve` that a run has, too.
_SETTINGS = ("precision", "device", "attention", "threads", "trust_remote_code", "weights")


@dataclass(frozen=True)
class Service:
    """One server.

    Attributes:
        role: Its kind.
        number: Its number among those of its kind.
        actor: The class of its actor.
        serve: Has an actor serve at a host and a port with a key; returns what stands for its `Serving`.
        names: What ranks look for at it by a name of the settings.
    """

    role: Literal["teacher", "worker", "environment"]
    number: int
    actor: type[Server]
    serve: Callable[[Any, str, int, str], Any]
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The actor's name."""
        return f"{self.role}-{self.number}"

    @property
    def words(self) -> str:
        """The same for people."""
        return f"worker {self.number}" if self.role == "worker" else f"server {self.number} of the {self.role}"


def services(config: Config) -> list[Service]:
    """All servers of a run, in the order of `Layout.roles`."""
    return [
        *[_teacher(config, number) for number in range(config.cluster.teachers)],
        *[_worker(config, number) for number in range(config.rollout.placed)],
        *[_environment(config, number) for number in range(config.cluster.environments)],
    ]


def variables(found: Sequence[tuple[Service, str]], rank: int, config: Config, key: str) -> dict[str, str]:
    """Variables by which a rank finds servers, and their key. It asks one server of the teacher, and all others.

    Args:
        found: The servers and their addresses.
        rank: Number of the rank.
        config: Settings of the run.
        key: Bearer token of all servers.
    """
    workers = [address for own, address in found if own.role == "worker"]
    teachers = [(own, address) for own, address in found if own.role == "teacher"]
    played = [(own, address) for own, address in found if own.role == "environment"]
    served: dict[str, str] = {}
    if teachers:
        own, address = teachers[rank % len(teachers)]
        served |= dict.fromkeys(own.names, address)
    if played:
        served |= dict.fromkeys(played[0][0].names, ",".join(address for _, address in played))
    return {
        **({VARIABLE: json.dumps(served), config.server.key: key} if served else {}),
        **({ADDRESSES: json.dumps(workers), KEY: key} if workers else {}),
    }


def _teacher(config: Config, number: int) -> Service:
    threads = config.model_copy(update={"threads": config.threads or config.cluster.teacher_cpus})
    words = [f"{name}={_word(threads.value(name))}" for name in _SETTINGS if threads.value(name) is not None]
    path = str(config.teacher)
    return Service(
        role="teacher",
        number=number,
        actor=Teacher,
        serve=lambda actor, host, port, key: actor.serve.remote(path, words, host, port, key),
        names=(path, str(Path(path).resolve())),
    )


def _worker(config: Config, number: int) -> Service:
    device, threads = "cpu" if config.device == "cpu" else "auto", config.threads or config.cluster.worker_cpus
    more = (device, threads, config.trust_remote_code, config.rollout.vllm)
    return Service(
        role="worker",
        number=number,
        actor=Worker,
        serve=lambda actor, host, port, key: actor.serve.remote(host, port, key, *more),
    )


def _environment(config: Config, number: int) -> Service:
    given = f"{PREFIX}{config.environment}"
    return Service(
        role="environment",
        number=number,
        actor=EnvironmentServer,
        serve=lambda actor, host, port, key: actor.serve.remote(given, (), host, port, key),
        names=(given,),
    )


def _word(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
