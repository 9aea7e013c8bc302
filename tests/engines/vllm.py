"""Real vLLM servers for the tests, each a process of its own in an environment of its own (`make engines`)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

PYTHON = Path(__file__).parents[2] / "build" / "engines" / "bin" / "python"
#: One thread; nothing is fetched, and nothing told to anybody.
_SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
#: Seconds for a server to start.
_PATIENCE = 300


@contextlib.contextmanager
def serving(folder: Path, log: Path, *limits: int) -> Iterator[list[str]]:
    """Addresses of servers of one model, each with its `--max-logprobs`; they start side by side."""
    with contextlib.ExitStack() as started:
        found = [started.enter_context(_server(folder, limit, log.with_suffix(f".{limit}.log"))) for limit in limits]
        for url, process, written in found:
            _wait(url, process, written)
        yield [url for url, *_ in found]


@contextlib.contextmanager
def _server(folder: Path, limit: int, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: Sequence[str] = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"),
        *("--port", str(port), "--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**27)),
        *("--max-logprobs", str(limit), "--served-model-name", "countdown"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **_SURROUNDINGS}, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}", process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.25)
    raise AssertionError(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")
