"""The process that speaks with Ray, and one that outlives it.

Where the head of a cluster or this machine's part of it ends, Ray ends every process that is connected to it, in C++
and without an exception. So Ray is spoken to in a child; its parent says in one line what happened.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType

from retort.errors import RunError

_END = b"\0"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_speaking: list[int] = []


def apart() -> int | None:
    """Goes on in a child process, to which this one passes all signals.

    Returns:
        None in the child; in the parent the child's exit code, once that has ended.

    Raises:
        RunError: In the parent: the child was ended by Ray, or killed.
    """
    sys.stdout.flush()
    heard, speak = os.pipe()
    lives, life = os.pipe()
    child = os.fork()
    if not child:
        os.close(heard)
        os.close(life)
        _begin(speak, lives)
        return None
    os.close(speak)
    os.close(lives)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # a terminal's Ctrl-C reaches the parent alone, which passes it on

    def passed(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, passed)
    with os.fdopen(heard, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if told.endswith(_END):
        return code
    advice = told.decode("utf-8", "replace").rpartition("\n")[2]
    raise RunError(
        "the Ray cluster ended, or this machine lost it: its head is gone, or the process that speaks with it was "
        f"killed; {advice or 'start the cluster again, and then the run'}"
    )


def advise(text: str) -> None:
    """Tells the parent how the run goes on if this process ends without a word."""
    if _speaking:
        os.write(_speaking[0], f"\n{text}".encode())


def _begin(speak: int, lives: int) -> None:
    """Makes this process a child that says when it ends in order, and that ends with its parent."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    _speaking[:] = [speak]
    atexit.register(os.write, speak, _END)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)

    def watch() -> None:
        os.read(lives, 1)  # nothing is ever written: the pipe closes with the parent
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
