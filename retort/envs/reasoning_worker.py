"""The process that works with reasoning-gym: one JSON request per line in, one reply per line out.

`retort.envs.reasoning` runs it by its path. Many of the package's scorers call `eval` on the answer, so each answer is
scored in a forked child under limits (`retort.envs.confined`).

In: {"name", "first", "index"} for a row, with "text" for the score of an answer to it. Out: {"question", "answer"} or
{"question", "score"} (null where it came to no end), or {"unknown": names}, or {"failed": words} where the package
makes no such row; first of all {"ready"} or {"error"}. The argument is how many seconds a score may take on the clock.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import random
import select
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

#: Rows of a data set; row `index` of the data set that begins at `first` follows from their sum in most generators.
SIZE = 1000
#: Seconds of processor time of one score; bytes of address space, and of a file.
SECONDS, MEMORY, FILE_SIZE = 2, 4 << 30, 1 << 20


def main() -> None:
    """Replies to requests until the input ends."""
    clock = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a scorer prints must not be taken for a reply
    try:
        reasoning_gym: Any = importlib.import_module("reasoning_gym")
        names: Any = importlib.import_module("reasoning_gym.factory").DATASETS
    except Exception as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    _reply(replies, {"ready": True})

    @lru_cache(maxsize=64)
    def rows(name: str, first: int) -> Any:
        _seed(first)
        return reasoning_gym.create_dataset(name, seed=first, size=SIZE)

    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if asked["name"] not in names:
            _reply(replies, {"unknown": sorted(names)})
            continue
        try:
            own = rows(asked["name"], asked["first"])
            _seed(asked["first"] + asked["index"])
            entry = own[asked["index"]]
        except Exception as error:
            _reply(replies, {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
            continue
        found = {"question": str(entry["question"])}
        if "text" in asked:
            _reply(replies, {**found, "score": _score(own, entry, asked["text"], clock)})
        else:
            _reply(replies, {**found, "answer": None if entry["answer"] is None else str(entry["answer"])})


def _seed(number: int) -> None:
    """Sets the random numbers of the process, which some generators (`list_functions`) draw from beside their own."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % (1 << 32))


def _score(rows: Any, entry: Any, text: str, clock: float) -> float | None:
    """The score of an answer, by a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _scored(rows, entry, text, write)
    os.close(write)
    ready, _, _ = select.select([read], [], [], clock)
    said = os.read(read, 64) if ready else b""
    os.close(read)
    with contextlib.suppress(OSError):
        os.kill(child, 9)
    os.waitpid(child, 0)
    return float(said) if said else None


def _scored(rows: Any, entry: Any, text: str, write: int) -> None:
    score = 0.0
    try:
        confined = _confined()
        confined.isolate()
        confined.confine(SECONDS, MEMORY, FILE_SIZE)
        score = float(rows.score_answer(text, entry))
    except BaseException:  # any error is the answer's fault, and so is an exit
        pass
    os.write(write, repr(score).encode())
    os._exit(0)


@lru_cache
def _confined() -> Any:
    """The module beside this file, which is no package here."""
    spec = importlib.util.spec_from_file_location("confined", Path(__file__).with_name("confined.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reply(replies: Any, content: dict[str, object]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
