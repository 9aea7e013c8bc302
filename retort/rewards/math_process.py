"""The side of a run of the process that judges mathematics (`retort.rewards.math_worker`)."""

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
# Importing sympy from a cold disk can take long; only after this is the worker considered broken.
START_SECONDS = 120.0
#: On the clock, for each second of processor time that is allowed: only a machine that stands still gets here.
PATIENCE = 30.0


class MathProcess:
    """Owns the worker process: starts it when first needed, replaces it where it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.finalizer: weakref.finalize[[subprocess.Popen[bytes]], MathProcess] | None = None

    def equal(self, gold: str, text: str, boxed: bool, digits: int, limit_s: float) -> bool | None:
        """Whether math-verify holds the two for equal; None where it found no end.

        Args:
            gold: The right answer.
            text: What is compared with it.
            boxed: The text is an answer; else an answer is looked for in it.
            digits: Decimals to which numbers that are not exact must agree.
            limit_s: Seconds of processor time.
        """
        request = {"gold": gold, "text": text, "boxed": boxed, "digits": digits, "limit_s": limit_s}
        with self.lock:
            for _ in range(2):
                reply = self._ask(request)
                if reply is not None:
                    return None if "given_up" in reply else bool(reply["equal"])
            return None  # the worker died of it, twice

    def close(self) -> None:
        """Ends the worker."""
        if self.finalizer is not None:
            self.finalizer()
        self.process = self.finalizer = None

    def _ask(self, request: dict[str, object]) -> dict[str, object] | None:
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it died after its last reply; that is not this text's doing
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
        """One reply; None, and no worker any more, if it ended or none came in time."""
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
        # The kernel's "with its parent" means the thread that started it, so only the main thread asks for that.
        tied = threading.current_thread() is threading.main_thread()
        self.process = process = subprocess.Popen(
            # By its path and with -P: the worker must import neither torch nor anything that lies beside it.
            [sys.executable, "-P", str(WORKER), *(["--die-with-parent", str(os.getpid())] if tied else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is for the run, which then stops in good order
        )
        self.finalizer = weakref.finalize(self, _end, process)
        ready = self._read(process, START_SECONDS)
        if ready is None or "error" in ready:
            self.close()
            why = "it ended, or took too long" if ready is None else ready["error"]
            raise RunError(f"the process that judges mathematics did not start: {why}")
        return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker and the child that judges for it: both are of one session."""
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
