"""Limits on a process that works with what a model wrote. Run by its path, it executes the Python of its input.

    python -s -S -P confined.py SECONDS MEMORY FILE_SIZE < code

It imports the standard library only.

Nothing here is a security boundary: a file that the user can read, the code can read. Where the kernel gives an
unprivileged process namespaces of its own, there is no network, and no process of the code outlives it.
"""

import contextlib
import linecache
import os
import signal
import sys
import traceback
from typing import Any

__all__ = ["confine", "isolate"]

_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG = 1


def confine(seconds: int, memory: int, file_size: int) -> None:
    """Sets limits that the kernel keeps, on this process and its children.

    Args:
        seconds: Processor time of each process.
        memory: Bytes of address space of each process.
        file_size: Bytes of each file that is written.
    """
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": memory, "RLIMIT_FSIZE": file_size, "RLIMIT_CORE": 0}
        for name, limit in limits.items():
            with contextlib.suppress(OSError, ValueError):  # a hard limit is lower already
                resource.setrlimit(getattr(resource, name), (limit, limit))


def isolate() -> bool:
    """Goes on as the first process of namespaces of its own, without a network, where the kernel allows that.

    Returns:
        Whether it does. The calling process waits for the new one meanwhile, and ends as it ends.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC) != 0:
        return False
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return True


def main() -> None:
    """Executes the code of the input as a program."""
    seconds, memory, file_size = (int(word) for word in sys.argv[1:4])
    isolate()
    confine(seconds, memory, file_size)
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    sys.argv[1:] = []
    linecache.cache["<code>"] = len(code), None, code.splitlines(True), "<code>"
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(code, "<code>", "exec"), names)
    except Exception as error:  # shown without the frame of this file
        where = error.__traceback__
        traceback.print_exception(type(error), error, where and where.tb_next)
        sys.exit(1)


if __name__ == "__main__":
    main()
