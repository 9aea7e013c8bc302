"""The run's side of the process that verifies mathematics (`retort.rewards.math_worker`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from retort.errors import RunError

__all__ = ["MathProcess"]

WORKER = Path(__file__).with_name("math_worker.py")
# Importing sympy from a cold disk can take long; only after this many seconds the worker counts as broken.
START_SECONDS = 120.0
#: Wall-clock seconds per second of processor time that is allowed: only a stalled machine exceeds this.
PATIENCE = 30.0


class MathProcess:
    """Owns the worker process: starts it on demand, and replaces it where it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.finalizer: weakref.finalize[[subprocess.Popen[bytes]], MathProcess] | None = None

    def equal(self, gold: str, text: str, boxed: bool, digits: int, limit_s: float) -> bool | None:
        """Whether math-verify finds the two equal; None where it came to no end.

        Args:
            gold: The reference answer.
            text: The text to compare with it.
            boxed: Whether the text is an answer; else an answer is extracted from it.
            digits: Decimals to which numbers that are not exact must agree.
            limit_s: Seconds of processor time.
        """
        request = {"gold": gold, "text": text, "boxed": boxed, "digits": digits, "limit_s": limit_s}
        with self.lock:
            for _ in range(2):
                reply = self._ask(request)
                if reply is not None:
                    return None if "given_up" in reply else bool(reply["equal"])
            return None  # the worker died on it, twice

    def close(self) -> None:
        """Ends the worker."""
        if self.finalizer is not None:
            self.finalizer()
        self.process = self.finalizer = None

    def _ask(self, request: dict[str, object]) -> dict[str, object] | None:
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it died after its last reply, which is not this text's fault
        process = self.process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self.close()
            return None
        return self._read(process, PATIENCE * float(str(request["limit_s"])))

    def _read(self, process: subprocess.Popen[bytes], limit_s: float) -> dict[str, object] | None:
        """Reads one reply; returns None, and ends the worker, if it died or sent none in time."""
        fired = threading.Event()

        def stop() -> None:
            fired.set()
            _kill(process)

        timer = threading.Timer(limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if fired.is_set() or not line.endswith(b"\n"):
            self.close()
        return json.loads(line) if line.endswith(b"\n") else None

    def _start(self) -> subprocess.Popen[bytes]:
        # The kernel's "with its parent" means the thread that started it, so only the main thread requests that.
        tied = threading.current_thread() is threading.main_thread()
        self.process = process = subprocess.Popen(
            # By its path and with -P: the worker must import neither torch nor any module that lies beside it.
            [sys.executable, "-P", str(WORKER), *(["--die-with-parent", str(os.getpid())] if tied else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a keyboard interrupt is for the run, which then stops in order
        )
        self.finalizer = weakref.finalize(self, _end, process)
        ready = self._read(process, START_SECONDS)
        if ready is None or "error" in ready:
            self.close()
            why = "it ended, or took too long" if ready is None else ready["error"]
            raise RunError(f"the process that verifies mathematics did not start: {why}")
        return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker and the child that compares for it: both are in one session."""
    if hasattr(os, "killpg") and process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 9)
    process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request that was never read
                pipe.close()
