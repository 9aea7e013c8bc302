"""Servers of models for tests: one in a thread of this process, one in a process that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
from misserving import serve

from retort.models.load import load_model
from retort.models.server import Server
from retort.serve.app import application
from retort.serve.scorer import Scorer
from retort.wire import Client

HERE = Path(__file__).parent


@contextlib.contextmanager
def in_thread(lm: Any, *, key: str = "", most_tokens: int = 4096) -> Iterator[str]:
    """The address of a server of a model of this process."""
    with answering(application(Scorer(lm, name="tiny", most_tokens=most_tokens), key=key)) as url:
        yield url


@contextlib.contextmanager
def answering(app: Any) -> Iterator[str]:
    """The address of an application in a thread of this process, which does not keep the process alive."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def connected(url: str, lm: Any, **settings: Any) -> Any:
    """The model behind a server, as a run loads it."""
    client = Client(url, **{"patience": 5.0, "timeout": 20.0, **settings})
    return load_model(url, source=Server.at(client), role="teacher", precision="fp32", device=lm.device)


class Process:
    """A process that serves a model folder, and misbehaves as the file `faults` says, one word for each POST.

    `429`, `500`, `503` are answered; `refuse` closes the connection; `cut` breaks off in the body; `drip` sends it a
    byte at a time; `short` leaves out the last row of each tensor; `nan` and `high` put NaN and 1 into all numbers;
    `garbage` is no safetensors; `kill` ends the process by signal 9; `-` is an answer as it should be.
    """

    def __init__(self, folder: Path, model: Path, *, port: int = 0) -> None:
        self.folder, self.model = folder, model
        self.start(model, port)

    def start(self, model: Path, port: int) -> None:
        """Starts it, again if need be, with a model."""
        (self.folder / "port").unlink(missing_ok=True)
        self.process = forked.started(serve, self.folder, model, port)
        while not (self.folder / "port").exists():
            assert self.process.exitcode is None
            time.sleep(0.02)
        self.port = int((self.folder / "port").read_text())
        self.url = f"http://127.0.0.1:{self.port}"

    def again(self, model: Path | None = None) -> None:
        """Ends it by signal 9 and starts it at the same port, perhaps with another model."""
        self.end()
        self.start(model or self.model, self.port)

    def fails(self, *faults: str) -> None:
        (self.folder / "faults").write_text(" ".join(faults))

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class Played:
    """A process that serves an environment, by `again` at the same port once more."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.start(0)

    def start(self, port: int) -> None:
        """Starts it."""
        (self.folder / "port").unlink(missing_ok=True)
        self.process = forked.started(play, self.folder, self.name, port)
        while not (self.folder / "port").exists():
            assert self.process.exitcode is None
            time.sleep(0.02)
        self.port = int((self.folder / "port").read_text())
        self.url = f"http://127.0.0.1:{self.port}"

    def again(self) -> None:
        """Ends it by signal 9, if it lives, and starts it at the same port."""
        self.end()
        self.start(self.port)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def play(folder: Path, name: str, port: int) -> None:
    """Serves an environment, as `retort serve` does; its port is in a file once it answers."""
    from retort.serve.command import serve

    def listening(own: int) -> None:
        (folder / "new").write_text(str(own))
        (folder / "new").rename(folder / "port")

    serve(f"env:{name}", port=port, say=lambda text: None, listening=listening)


class Judge:
    """A process with the judge by rules of Countdown, as a user starts it; it is none of the ranks that need it."""

    def __init__(self) -> None:
        command = [sys.executable, "-u", "-m", "retort", "serve", "rules:countdown", "--port", "0"]
        ranked = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in ranked}
        environment |= {"PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().partition(" at ")[2].partition(";")[0]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
