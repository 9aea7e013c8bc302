"""The process that judges mathematics: one JSON request per line in, one reply per line out.

Run by its path by `retort.rewards.verify`, which kills it when a reply takes too long. It imports math-verify and the
standard library only. In: {"gold", "text", "boxed"}. Out: {"equal"}; first of all {"ready"}, or {"error"}.
"""

import contextlib
import json
import os
import sys
from typing import Any

# Bytes of address space; a power tower must not take the run's memory before the time limit ends it.
MOST_MEMORY = 4 << 30


def main() -> None:
    """Answers until the other side closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows, nor above a lower hard limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        judge = _judge()
    except Exception as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    _reply(replies, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            equal = judge(request["gold"], request["text"], request["boxed"])
        except (Exception, MemoryError):  # the text's doing, whatever it is: it is not right
            equal = False
        _reply(replies, {"equal": equal})


def _reply(replies: Any, content: dict[str, object]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def _judge() -> Any:
    import logging

    import math_verify

    logging.disable()

    def judge(gold: str, text: str, boxed: bool) -> bool:
        # No timeouts of math-verify's own (see retort.rewards.verify): the other side kills this process.
        parsed = math_verify.parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=None)  # type: ignore[arg-type]
        golds = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)  # type: ignore[arg-type]
        return bool(math_verify.verify(golds, parsed, timeout_seconds=None))

    return judge


if __name__ == "__main__":
    main()
