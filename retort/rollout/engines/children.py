"""Workers as child processes on this machine's loopback, each started again when it ends or hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from pathlib import Path

from retort.errors import UserError
from retort.rollout.engines.processes import end, free_ports, last_error, started
from retort.wire.protocol import HEALTH
from retort.wire.workers import KEY

#: Seconds for a process to begin to answer, between two looks at all of them, and between two questions whether they
#: answer.
STARTS = 600.0
_EVERY, _ASKS = 0.1, 2.0
#: Seconds for an answer to such a question.
_ANSWERS = 2.0
#: How often in a row a process that ends before it answers is started.
_TRIES = 3
#: The program.
MODULE = "retort.serve.worker"


class _Child:
    """One of the processes: what it is started with, and since when it has not answered."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.command, self.port, self.log = command, port, log
        self.process: subprocess.Popen[bytes] | None = None
        self.heard, self.answers, self.failed = time.monotonic(), False, 0
        self.problem: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, environment: dict[str, str]) -> None:
        self.process = started(self.command, self.log, cwd=self.log.parent, env=environment)
        self.heard, self.answers = time.monotonic(), False

    def ask(self) -> None:
        """Finds out whether it answers."""
        with contextlib.suppress(OSError, urllib.error.URLError), _direct().open(self.url + HEALTH, timeout=_ANSWERS):
            self.heard, self.answers, self.failed = time.monotonic(), True, 0


class Children:
    """Some workers. They end with `close`, with this object, and with this process however that ends."""

    def __init__(self, options: Sequence[Sequence[str]], folder: Path, *, key: str, hangs: float) -> None:
        """Starts them and waits until they answer.

        Args:
            options: Further arguments of each, see `retort.serve.worker`.
            folder: Where they run, and where their logs go.
            key: The key that they ask for.
            hangs: Seconds without an answer after which one is killed and started again.

        Raises:
            UserError: One does not start; the line ends with the reason that its log gives.
        """
        paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
        self._environment = {**os.environ, "PYTHONPATH": paths, KEY: key}
        self._hangs, self._ended = hangs, threading.Event()
        module = [sys.executable, "-P", "-m", MODULE]
        ports = free_ports(len(options))
        self._all = [
            _Child([*module, "--port", str(port), *own], port, folder / f"worker-{number}.log")
            for number, (port, own) in enumerate(zip(ports, options, strict=True))
        ]
        self._ends = weakref.finalize(self, _end, self._all, self._ended)
        try:
            for own in self._all:
                own.start(self._environment)
            for number, own in enumerate(self._all):
                self._wait(number, own)
        except BaseException:
            self.close()
            raise
        arguments = (self._all, self._environment, self._ended, hangs)
        threading.Thread(target=_watch, args=arguments, daemon=True, name="workers").start()

    @property
    def urls(self) -> list[str]:
        """Their addresses, which stay the same when they are started again."""
        return [own.url for own in self._all]

    @property
    def logs(self) -> list[Path]:
        """The files of what they print."""
        return [own.log for own in self._all]

    @property
    def pids(self) -> list[int]:
        """The processes that lead their groups."""
        return [own.process.pid for own in self._all if own.process is not None]

    def problem(self, number: int) -> str | None:
        """Why one of them is not started again any more; None while it is."""
        return self._all[number].problem

    def close(self) -> None:
        """Ends them."""
        self._ends()

    def _wait(self, number: int, own: _Child) -> None:
        ends = time.monotonic() + STARTS
        while time.monotonic() < ends:
            assert own.process is not None
            if own.process.poll() is not None:
                raise UserError(f"worker {number} does not start{last_error(own.log)}; its log: {own.log}")
            own.ask()
            if own.answers:
                return
            time.sleep(_EVERY)
        raise UserError(f"worker {number} has not started within {STARTS:g} seconds; its log: {own.log}")


def _direct() -> urllib.request.OpenerDirector:
    """What asks this machine itself, whatever proxy the environment names."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _watch(children: Sequence[_Child], environment: dict[str, str], ended: threading.Event, hangs: float) -> None:
    """Starts again what ends or hangs, until all are ended."""
    asked = time.monotonic()
    while not ended.wait(_EVERY):
        asks = time.monotonic() - asked > _ASKS
        asked = time.monotonic() if asks else asked
        for own in children:
            assert own.process is not None
            if own.problem is not None:
                continue
            if asks or not own.answers:
                own.ask()
            silent = time.monotonic() - own.heard > (hangs if own.answers else max(hangs, STARTS))
            if silent:
                end(own.process)
            if own.process.poll() is not None and not ended.is_set():
                end(own.process)
                own.failed += 0 if own.answers else 1
                if own.failed > _TRIES:
                    own.problem = f"it ended {own.failed} times in a row before it answered{last_error(own.log)}"
                else:
                    own.start(environment)
                if ended.is_set():  # meanwhile: whoever ended them did not see this one
                    end(own.process)


def _end(children: Sequence[_Child], ended: threading.Event) -> None:
    ended.set()
    for own in children:
        if own.process is not None:
            end(own.process)
