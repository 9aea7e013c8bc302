"""Servers of models for benchmarks, each a process of its own on this machine, and a relay that counts bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: One thread for each process; nothing is fetched, and nothing told to anybody.
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
#: Seconds for a server to start.
PATIENCE = 900


def surroundings() -> dict[str, str]:
    """The environment of a process that a benchmark starts: this checkout, one thread."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **SURROUNDINGS, "PYTHONPATH": paths}


@dataclass(frozen=True)
class Running:
    """A server that is up.

    Attributes:
        url: Its address.
        process: Id of its process, and of the group of all that it started.
    """

    url: str
    process: int

    def cpu(self) -> float:
        """Seconds of CPU that it has used, with all that it started."""
        found = 0.0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process:
                    found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found


@contextlib.contextmanager
def ours(model: str, *words: str) -> Iterator[Running]:
    """`retort serve MODEL`, started with settings as `key=value`."""
    port = _free()
    command = [sys.executable, "-m", "retort", "serve", model, "--port", str(port), "threads=1", *words]
    with _running(command, port) as process:
        yield Running(f"http://127.0.0.1:{port}", process)


@contextlib.contextmanager
def vllm(python: str, folder: str, dtype: str = "float32", most_logprobs: int = 20) -> Iterator[Running]:
    """A vLLM server of a model folder, in the environment of another interpreter."""
    port = _free()
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--enforce-eager", "--dtype", dtype, "--kv-cache-memory-bytes", str(2**28)]
    words += ["--max-logprobs", str(most_logprobs), "--served-model-name", "teacher"]
    with _running(words, port) as process:
        yield Running(f"http://127.0.0.1:{port}", process)


def _free() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[int]:
    """Id of a server process that is up; it ends with the block, and with it what it started."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings(), start_new_session=True)
        try:
            ends = time.monotonic() + PATIENCE
            while not _up(port):
                if process.poll() is not None or time.monotonic() > ends:
                    log.seek(0)
                    raise SystemExit(
                        f"{' '.join(command)} did not start:\n{log.read()[-3000:].decode(errors='replace')}"
                    )
                time.sleep(0.1)
            yield process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _up(port: int) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        return True
    return False


class Relay:
    """Passes connections on to a server of this machine, and counts what goes through: HTTP's own words, too.

    Attributes:
        url: Its address.
        sent, received: Bytes to the server, and from it, since `reset`.
    """

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self.sent = self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Counts from 0."""
        with self._lock:
            self.sent = self.received = 0

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, there: bool) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(2**16):
                with self._lock:  # counted before it arrives: whoever has an answer sees all of it counted
                    self.sent += len(part) if there else 0
                    self.received += 0 if there else len(part)
                sink.sendall(part)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
