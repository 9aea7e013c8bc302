"""The process that verifies mathematics: one JSON request per line in, one reply per line out.

`retort.rewards.math_process` runs it by its path. It imports math-verify and the standard library only. This process
loads the libraries once and forks a child that compares. The kernel ends a child whose comparison exceeds the processor
time that its request allows, and another is forked at once. The limit is on processor time and not on the wall clock,
because a grade must not depend on the machine's other work.

In: {"gold", "text", "boxed", "digits", "limit_s"}. Out: {"equal"} or {"given_up"}; first of all {"ready"} or {"error"}.

It does not outlive the process that started it. On Linux the kernel ends it with its parent. Elsewhere, and where a
thread started it, it ends within the processor time of the current comparison, because its input has ended then.
"""

import contextlib
import json
import os
import signal
import sys
from typing import Any

# Bytes of address space, so that a power tower cannot take the run's memory before the time limit.
MOST_MEMORY = 4 << 30
_PR_SET_PDEATHSIG = 1
# Compared before the first fork, which fills the parsers' tables, so that no comparison pays for them.
_WARM = (
    r"\frac{1}{2}",
    r"(1, 2] \cup [3, \infty)",
    r"x = \sqrt{2} + 1",
    r"\{1, 2\}",
    "3.5",
    r"\pi r^2",
    "1,2",
    r"2^{10}",
)


def main() -> None:
    """Replies to requests until the input ends."""
    if "--die-with-parent" in sys.argv:
        _die_with(int(sys.argv[-1]))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's output must not be taken for a reply
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows, nor above a lower hard limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        verify = _verifier()
    except Exception as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    _reply(replies, {"ready": True})
    if not hasattr(os, "fork"):
        _serve(verify, replies)
        return
    while True:
        own = os.getpid()
        child = os.fork()
        if child == 0:
            _die_with(own)
            _serve(verify, replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return
        _reply(replies, {"given_up": True})


def _serve(verify: Any, replies: Any) -> None:
    # One request at a time lies in the pipe, so that nothing is lost with a child's buffer.
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _allow(request["limit_s"])
        try:
            equal = verify(request["gold"], request["text"], request["boxed"], request["digits"])
        except (Exception, MemoryError):  # any error is the text's fault: it is not right
            equal = False
        _allow(0.0)
        _reply(replies, {"equal": equal})


def _allow(seconds: float) -> None:
    """Lets the kernel end this process after so much processor time, also within C code; 0 removes the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _die_with(parent: int) -> None:
    if sys.platform != "linux":
        return
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this request
        os._exit(0)


def _reply(replies: Any, content: dict[str, object]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def _verifier() -> Any:
    import logging

    import math_verify

    logging.disable()

    def verify(gold: str, text: str, boxed: bool, digits: int) -> bool:
        # No timeouts of math-verify's own (see retort.rewards.verify): the kernel ends this process.
        parsed = math_verify.parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=None)  # type: ignore[arg-type]
        golds = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)  # type: ignore[arg-type]
        return bool(math_verify.verify(golds, parsed, float_rounding=digits, timeout_seconds=None))

    for text in _WARM:
        verify(text, text, True, 6)
    return verify


if __name__ == "__main__":
    main()
