"""Runs a command that ends when whoever started it ends, also by `kill -9`: `python -c SOURCE PARENT COMMAND...`.

The interpreter may be that of another environment, so nothing but the standard library is imported. It leads a session
of its own. It ends with all its processes when its standard input is closed, when its parent is gone, or when the
command is. A child of its own ends them where it was killed itself, as Ray does with the children of an actor.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

#: Seconds between two looks at the parent.
_EVERY = 1.0


def _end() -> None:
    """Ends this process and all that it started."""
    os.killpg(0, signal.SIGKILL)


def _until_closed() -> None:
    while os.read(0, 4096):
        pass
    _end()


def _until_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY)
    _end()


def _watched() -> None:
    """Has a child of this process end all others once this one is gone without having done so."""
    guard = os.getpid()
    if not os.fork():
        _until_orphaned(guard)


def _with_this_process() -> None:
    """Has the system end the command when this process is killed, where the system can."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(parent: int, command: list[str]) -> None:
    """Runs the command until it, the parent, or the standard input ends."""
    _watched()
    threading.Thread(target=_until_closed, daemon=True).start()
    threading.Thread(target=_until_orphaned, args=(parent,), daemon=True).start()
    # Its own threads are asleep in system calls here, so what runs between fork and exec finds no lock held.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_with_this_process)
    process.wait()
    _end()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
