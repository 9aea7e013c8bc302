"""A rank as an actor: the process that torchrun would start, started by Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.cluster.log import redirect
from retort.cluster.mailbox import Relay, beating
from retort.errors import RetortError

#: Names of the interface that only this machine itself reaches.
_LOOPBACK = ("lo", "lo0")
#: Linux asks for the IPv4 address of an interface by this number.
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Where:
    """Where an actor is: its machine, that one's address, its GPUs there, and the file of what it prints."""

    node: str
    host: str
    gpus: tuple[int, ...]
    log: str


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        code: The exit code.
        message: What is said of it on one line; None where another rank says it, or nothing went wrong.
        trace: Of an error that nobody expected.
    """

    code: int
    message: str | None = None
    trace: str = ""


def where(log: str) -> Where:
    """Where this actor is.

    Args:
        log: The file of what it prints.
    """
    import ray  # pyright: ignore[reportMissingImports]

    context = ray.get_runtime_context()
    gpus = tuple(int(number) for number in context.get_accelerator_ids().get("GPU", []))
    return Where(context.get_node_id(), ray.util.get_node_ip_address(), gpus, log)


class Rank:
    """An actor. It is brought together with the others as under torchrun, and runs the same code."""

    def __init__(self, name: str, folder: str) -> None:
        """Goes to the folder in which the command was given.

        Args:
            name: Of the actor, such as `rank-0`.
            folder: That folder, which all machines see.
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._log = str(redirect(name))
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def where(self) -> Where:
        """Where it is."""
        return where(self._log)

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Imports what takes longest.

        Args:
            environment: Variables that this reads.
        """
        os.environ.update(environment)
        from retort.train import runner  # noqa: F401  # pyright: ignore[reportUnusedImport]

    def free_port(self) -> int:
        """A port that nobody listens at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return int(free.getsockname()[1])

    def run(
        self, job: Any, folder: str, environment: Mapping[str, str], mailbox: Any, name: str, hangs: float
    ) -> Outcome:
        """Makes the run together with the others.

        Args:
            job: A `Job`.
            folder: The folder in which the command was given.
            environment: Variables, those of torchrun among them.
            mailbox: The handle of a `Mailbox`.
            name: Under which it gives signs of life.
            hangs: Seconds after which one that gives none counts as hung.
        """
        beating(mailbox, name, hangs)
        os.environ.update(environment)
        rank = int(environment["RANK"])
        if os.getcwd() != folder:
            host = socket.gethostname()
            return Outcome(2, f"rank {rank} on {host} does not see {folder}: all machines must see it under this path")
        together = environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]
        interface = interface_of(None if together else where("").host)
        os.environ.update(
            {"GLOO_SOCKET_IFNAME": interface} if interface and "GLOO_SOCKET_IFNAME" not in os.environ else {}
        )
        if rank == 0:
            threading.Thread(target=_obey, args=(mailbox,), daemon=True).start()
        relay = Relay(mailbox)
        outcome = _performed(job, relay)
        if rank == 0:
            relay.arrived()
        if not outcome.code:
            shutil.rmtree(Path(self._log).parent, ignore_errors=True)
        return outcome


def interface_of(host: str | None) -> str | None:
    """The network interface of an IPv4 address of this machine, or of loopback for None; None where it is not found.

    Without it gloo takes the address that the machine's own name resolves to, which others may not reach.
    """
    names = [name for _, name in socket.if_nameindex()]
    if host is None:
        return next((name for name in names if name in _LOOPBACK), None)
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for name in names:
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == host:
                    return name
    return None


def _obey(mailbox: Any) -> None:
    """Raises the driver's signals in this process."""
    import ray  # pyright: ignore[reportMissingImports]

    with contextlib.suppress(ray.exceptions.RayError):
        while True:
            os.kill(os.getpid(), ray.get(mailbox.next_signal.remote()))


def _performed(job: Any, relay: Relay) -> Outcome:
    from retort.cluster.job import Quiet, perform
    from retort.console.terminal import quiet_libraries
    from retort.ranks import may_speak

    quiet_libraries()
    try:
        perform(job, lambda leads: relay if leads else Quiet(), relay.show)
    except RetortError as error:
        return Outcome(error.exit_code, str(error) if may_speak() else None)
    except KeyboardInterrupt:
        return Outcome(1, "interrupted")
    except OSError as error:
        return Outcome(1, f"{error.filename or 'standard output'}: {error.strerror or error}")
    except Exception as error:
        trace = traceback.format_exc()
        print(trace, flush=True)
        return Outcome(1, f"{type(error).__name__}: {error}", trace)
    return Outcome(0)
