r"""Verifiers: 1.0 for a right response, 0.0 for a wrong one, whatever the response holds.

Model output is hostile: it may be a mebibyte of brackets, or `\boxed{9^{9^{9}}}`. A verifier neither raises nor hangs
on it. Mathematics is therefore judged in a worker process (`retort.rewards.math_worker`) that is killed when it takes
too long, and not with the timeouts of math-verify itself, which interrupt by `signal.alarm`: these work on the main
thread only, take the alarm away from whoever else uses it, wait for C code to return, and bound no memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from retort.errors import RunError, UserError, did_you_mean
from retort.types import Prompt

__all__ = [
    "BaitVerifier",
    "CoachedVerifier",
    "CountdownVerifier",
    "ExactVerifier",
    "GivesFeedback",
    "GivesParts",
    "MathVerifier",
    "RankingVerifier",
    "Verifier",
    "last_boxed",
    "parts_of",
    "verifier_for",
]

#: Characters of a boxed answer (longer is wrong) and of the end of a text in which an unboxed one is looked for.
MOST_BOXED = 1000
MOST_TAIL = 1000
#: Characters from the end of a text in which the box is looked for.
MOST_TEXT = 100_000

WORKER = Path(__file__).with_name("math_worker.py")
# Importing sympy from a cold disk can take long; only after this is the worker considered broken.
START_SECONDS = 120.0


class Verifier(Protocol):
    """Says whether a response is right. Never raises because of the text, and returns within seconds."""

    @property
    def name(self) -> str:
        """Short name, as in the setting `task`."""
        ...

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        ...


@runtime_checkable
class GivesFeedback(Protocol):
    """What a verifier may do besides: say in words what is wrong. Never raises because of the text."""

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the text, in words that the task's models know; empty if nothing is."""
        ...


@runtime_checkable
class GivesParts(Protocol):
    """What a verifier may do besides: measure more of a response than whether it is right.

    Parts are recorded (curves `reward/<part>`, columns of the before/after table) and are no part of the reward.
    """

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """Measures of the text by name; one that a prompt does not have is absent. Never raises because of the text."""
        ...


class ExactVerifier:
    """Right if the text equals the answer, white space aside."""

    name = "exact"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        return float(text.split() == _answer(prompt, self.name).split())


class CountdownVerifier:
    """Right if the text solves the Countdown problem that the prompt states; needs no answer."""

    name = "countdown"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        from retort.tasks.countdown import check

        return float(check(prompt.text, text))


class RankingVerifier:
    """Right if the text parses as the list that the prompt asks for, however good the ranking; needs no answer."""

    name = "ranking"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a well-formed response to the prompt, else 0.0."""
        from retort.tasks.ranking import check

        return float(check(prompt.text, text))


class CoachedVerifier:
    """Right if the text solves the Countdown problem after the prompt's last `;`, and says what is wrong with it."""

    name = "coached"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        from retort.tasks.coached import check

        return float(check(prompt.text, text))

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the text, such as `step 2 : no 7`; empty if nothing is."""
        from retort.tasks.coached import feedback

        return feedback(prompt.text, text)


class BaitVerifier(CoachedVerifier):
    """The same for prompts that carry a wrong suggestion; besides, whether that was followed."""

    name = "bait"

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """`followed`: 1.0 if the text is the suggestion, token for token; nothing where the prompt has none."""
        from retort.tasks.coached import bait, followed

        return {} if bait(prompt.text) is None else {"followed": float(followed(prompt.text, text))}


class MathVerifier:
    r"""Right if the last `\boxed{...}` (else the final expression of the text) equals the answer, by math-verify.

    Only that one box counts: a text that boxes several answers gets no second guess. A box without end (the text was
    truncated in it) does not count. Equal strings and whole numbers are compared here; all else goes to the worker
    process, one request at a time, from any thread. Use it as a context manager, or let go of it, to end the worker.

    Args:
        limit_s: Seconds after which a comparison is given up and the response is wrong.

    Raises:
        UserError: math-verify is not installed.
    """

    name = "math"

    def __init__(self, limit_s: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "judging mathematics needs the library `math-verify`; install it with "
                "pip install 'retort-distill[math]'"
            )
        self._judge = _Judge(limit_s)
        # Rollouts of one prompt often agree, and a hopeless comparison should cost its time limit only once.
        self._equal = lru_cache(maxsize=4096)(self._judge.equal)

    def __call__(self, prompt: Prompt, text: str) -> float:
        """1.0 if the text is a right response to the prompt, else 0.0."""
        gold = _answer(prompt, self.name).strip()
        boxed = last_boxed(gold)
        gold = gold if boxed is None else boxed
        boxed = last_boxed(text[-MOST_TEXT:])
        if boxed is None:
            tail = text[-MOST_TAIL:].strip().removesuffix(".")  # math-verify reads "14/3." as a float
            return float(bool(tail) and (_compact(tail) == _compact(gold) or self._equal(gold, tail, False)))
        if len(boxed) > MOST_BOXED or not boxed.strip():
            return 0.0
        ours, theirs = _compact(gold), _compact(boxed)
        if ours == theirs:
            return 1.0
        if _is_whole(ours) and _is_whole(theirs):
            return float(int(ours) == int(theirs))
        return float(self._equal(gold, boxed, True))

    @property
    def given_up(self) -> int:
        """How many comparisons found no end and were called wrong."""
        return self._judge.given_up

    def close(self) -> None:
        """Ends the worker process; a later call starts another."""
        self._judge.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


VERIFIERS = {
    verifier.name: verifier
    for verifier in (CountdownVerifier, RankingVerifier, CoachedVerifier, BaitVerifier, ExactVerifier, MathVerifier)
}
#: These compare with the answer of the prompt; the others read the problem itself.
NEED_ANSWER = (ExactVerifier.name, MathVerifier.name)


def verifier_for(task: str | None, prompts: Sequence[Prompt]) -> Verifier | None:
    """The verifier of a task.

    Args:
        task: `countdown`, `ranking`, `coached`, `bait`, `math` or `exact`; None means `math` if every prompt has an
            answer, else no verifier.
        prompts: What will be judged; `math` and `exact` need an answer in each.

    Returns:
        The verifier, or None if responses get no reward.

    Raises:
        UserError: No such task, a prompt without an answer, or math-verify is not installed.
    """
    if task is None:
        return MathVerifier() if prompts and all(prompt.answer is not None for prompt in prompts) else None
    if task not in VERIFIERS:
        raise UserError(f"task: there is no verifier '{task}'; {did_you_mean(task, VERIFIERS)}")
    if task in NEED_ANSWER:
        for prompt in prompts:
            _answer(prompt, task)
    return VERIFIERS[task]()


def parts_of(verifier: Verifier | None, prompt: Prompt, text: str) -> Mapping[str, float]:
    """What a verifier measures of a text besides whether it is right; empty if it does not (see `GivesParts`)."""
    return verifier.parts(prompt, text) if isinstance(verifier, GivesParts) else {}


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}` or `\fbox{...}` of a text; None if there is none."""
    end = len(text)
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\{", text))):
        depth = 0
        for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end() - 1, end):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return text[box.end() : brace.start()]
        # This one is never closed, so neither is one around it: an earlier box must end before it. Hence the scan
        # is linear, however many boxes are opened.
        end = box.start()
    return None


def _answer(prompt: Prompt, task: str) -> str:
    if prompt.answer is None:
        raise UserError(f"prompt '{prompt.id}' has no answer, which task '{task}' needs; add a column 'answer'")
    return prompt.answer


def _compact(text: str) -> str:
    return "".join(text.split()).strip("$")


def _is_whole(text: str) -> bool:
    return len(text) <= 18 and re.fullmatch(r"-?[0-9]+", text) is not None


class _Judge:
    """Owns the worker process: starts it when first needed, kills it when it takes too long."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.given_up = 0
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.finalizer: weakref.finalize[[subprocess.Popen[bytes]], _Judge] | None = None

    def equal(self, gold: str, text: str, boxed: bool) -> bool:
        """Whether math-verify holds the two for equal; False too where it found no end."""
        with self.lock:
            reply = self._ask({"gold": gold, "text": text, "boxed": boxed})
        self.given_up += reply is None
        return reply is not None and bool(reply["equal"])

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
        return self._read(process, self.limit_s)

    def _read(self, process: subprocess.Popen[bytes], limit_s: float) -> dict[str, object] | None:
        """One reply; None, and no worker any more, if it ended or none came in time."""
        fired = threading.Event()

        def stop() -> None:
            fired.set()
            process.kill()

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
        self.process = process = subprocess.Popen(
            # By its path and with -P: the worker must import neither torch nor anything that lies beside it.
            [sys.executable, "-P", str(WORKER)],
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


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a request that was never read
                pipe.close()
