"""Generated problems of reasoning-gym with their graders: `--data reasoning_gym:NAME`. Each is a single turn."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from retort.align.text import after_thinking
from retort.core.rollouts import Prompt
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.errors import RunError, UserError, did_you_mean

__all__ = ["ReasoningGym", "rows"]

_WORKER = Path(__file__).with_name("reasoning_worker.py")
_ROW = re.compile(r"(?P<name>\w+)-(?P<first>\d+)\+(?P<index>\d+)", re.ASCII)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
#: Characters of an answer that is scored; a longer one is wrong.
MOST_ANSWER = 10_000
#: Seconds on the clock that the score of an answer may take; of processor time it may take two.
CLOCK = 60.0
#: A text that answers no problem.
_NO_ANSWER = "zzz"


def rows(name: str, first: int) -> Iterator[dict[str, str]]:
    """Yields the rows of a generator, with the problem as the prompt.

    Args:
        name: One of the package's generators, say `countdown`.
        first: Number of the first row, which is the generator's seed.

    Raises:
        UserError: There is no such generator; it makes no rows; or its grader takes every answer for right.
    """
    index = 0
    while True:
        found = _worker().ask({"name": name, "first": first, "index": index})
        if "unknown" in found:
            raise UserError(f"reasoning_gym has no generator '{name}'; {did_you_mean(name, found['unknown'])}")
        if "failed" in found:
            raise UserError(f"reasoning_gym's generator '{name}' makes no row {first}+{index}: {found['failed']}")
        if index == 0:
            _refuse_blind(name, first)
        answer = {} if found["answer"] is None else {"answer": found["answer"]}
        yield {"id": f"{name}-{first}+{index}", "prompt": found["question"], **answer}
        index += 1


def _refuse_blind(name: str, first: int) -> None:
    """Raises `UserError` where a generator's grader does not look at the answer."""
    found = _worker().ask({"name": name, "first": first, "index": 0, "text": _NO_ANSWER})
    if (found["score"] or 0.0) >= 1:
        raise UserError(
            f"reasoning_gym's grader of '{name}' takes even the answer '{_NO_ANSWER}' for right, so nothing can be "
            "learnt from its rewards; use another generator"
        )


class ReasoningGym:
    """The environment: every episode is over after its first turn, and the generator's grader rewards it.

    A problem is found again by the id of its row, so that any file with these ids and prompts can be graded.
    """

    def __init__(self, *, tools: bool = False) -> None:
        """Builds the environment.

        Args:
            tools: Must be false.

        Raises:
            UserError: Tools are asked for.
        """
        if tools:
            raise UserError("rollout.tools: the environment reasoning_gym has no tools to offer; leave it out")

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`. The prompt stays as it is."""
        row = _ROW.fullmatch(prompt.id)
        if row is None:
            words = f"row '{prompt.id}' is none of reasoning_gym's: its id must be like countdown-0+7"
            return [FailedEpisode(prompt, words) for _ in members]
        asked = {"name": row["name"], "first": int(row["first"]), "index": int(row["index"])}
        return [_Problem(prompt, asked) for _ in members]


@dataclass(frozen=True)
class _Problem:
    prompt: Prompt
    asked: dict[str, Any]

    def reply(self, text: str) -> Reply:
        answer = _answer(text)
        found = _worker().ask({**self.asked, "text": answer if len(answer) <= MOST_ANSWER else ""})
        if found.get("question", "\0") not in self.prompt.text:  # unknown, failed, or another
            return FailedEpisode(
                self.prompt, f"row '{self.prompt.id}': the installed reasoning_gym makes another problem of this id"
            ).reply(text)
        score = found["score"] or 0.0
        score = score if math.isfinite(score) else 0.0
        return Reply(over=True, reward=score, measures={"success": float(score >= 1), "tool_errors": 0.0})

    def close(self) -> None:
        pass


def _answer(text: str) -> str:
    """What is scored of a turn: the last `<answer>`, or everything behind the thinking."""
    said = after_thinking(text)
    tagged = _TAGGED.findall(said)
    return (tagged[-1] if tagged else said).strip()


class _Worker:
    """Owns the worker process, which starts with the first request."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # The order of a set of words is part of some generators' problems.
        surroundings = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(CLOCK)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=surroundings,
            start_new_session=True,  # a keyboard interrupt is for the run, which then stops in order
        )
        weakref.finalize(self, _end, self.process)
        ready = self._read()
        if "error" in ready:
            raise RunError(f"reasoning_gym cannot be imported: {ready['error']}")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request, see `retort.envs.reasoning_worker`."""
        with self.lock:
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):  # it ended, which reading says
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
            return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            _worker.cache_clear()  # the next request starts another
            raise RunError("the process that works with reasoning_gym ended; start the run again to go on")
        return json.loads(line)


@lru_cache(maxsize=1)
def _worker() -> _Worker:
    return _Worker()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request that was never read
                pipe.close()
