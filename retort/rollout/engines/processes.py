"""Child processes that lead a group, end with this process however that ends, and write their logs to files."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from retort.errors import shortened, visible
from retort.rollout.engines import guard

#: Seconds for killed processes to be gone, which takes longest with much memory, and between two looks at them.
_GOES, _LOOKS = 30.0, 0.01
#: Characters of the log's end that are looked through for a reason.
_TAIL = 20_000
#: Words of lines that only say that there is another error before them.
_TOLD_AGAIN = ("See root cause", "See stack trace (above)")


def started(
    command: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str], python: str = sys.executable
) -> subprocess.Popen[bytes]:
    """A command that runs under `retort.rollout.engines.guard`.

    Args:
        command: The program and its arguments.
        log: File of what it prints, which is emptied first.
        cwd: The folder in which it runs.
        env: Its environment variables.
        python: The interpreter of the guard.
    """
    source = Path(guard.__file__).read_text(encoding="utf-8")
    with log.open("wb") as out:
        return subprocess.Popen(
            [python, "-c", source, str(os.getpid()), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback at which nobody listens."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in found:
            own.bind(("127.0.0.1", 0))
        return [int(own.getsockname()[1]) for own in found]


def last_error(log: Path) -> str:
    """The last error in a log, as the end of a sentence."""
    with contextlib.suppress(OSError):
        found = reason(log.read_bytes()[-_TAIL:].decode("utf-8", "replace"))
        if found:
            return f": {shortened(visible(found), 300)}"
    return ""


def reason(log: str) -> str:
    """The error that a log ends with, without its time and process; empty where it names none."""
    lines = [line.rpartition("] ")[2] if "ERROR" in line else line for line in log.splitlines()]
    lines = [line.partition(") ")[2] if line.startswith("(") else line for line in lines]
    told = [line.strip() for line in lines if line.strip()]
    named = ("Error", "Exception", "error")
    errors = [line for line in told if line.split(":")[0].endswith(named) or ": error: " in line]
    # An exception of its engine is told again by those around it, in general words.
    own = [line for line in errors if not any(words in line for words in _TOLD_AGAIN)]
    return (own or errors or told or [""])[-1]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a group, with its group, and waits until all of them are gone, memory and ports too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + _GOES
    while lives(process.pid) and time.monotonic() < ends:
        time.sleep(_LOOKS)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def lives(group: int) -> bool:
    """Whether a process of a group runs. One that has ended and that its parent has yet to notice does not."""
    try:
        os.killpg(group, 0)
    except OSError:  # macOS: not permitted where all of them have ended
        return False
    if not Path("/proc/self/stat").is_file():
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            # The name before these fields, in brackets, may hold anything.
            state, _, own = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                return True
    return False
