"""Verdicts on forms of answers, the thinking block, and the bounds of what judging costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rewards.answer_forms import BOXED, MISSED, REAL, TEXTS
from support import group_of

from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.rewards import ByText, CountdownVerifier, ExactVerifier, MathVerifier, verifier_for, verify
from retort.rewards.answers import hopeless, number
from retort.rewards.base import graded
from retort.rewards.verify import CoachedVerifier

DATA = Path(__file__).parents[2] / "../shared/data/math"


def prompt(answer: str | None, text: str = "?") -> Prompt:
    return Prompt("row-7", (Message("user", text),), answer=answer)


@pytest.fixture(scope="module")
def judge() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    with MathVerifier() as verifier:
        yield verifier


@pytest.mark.parametrize(("gold", "text", "right"), BOXED)
def test_boxed_answers(judge: MathVerifier, gold: str, text: str, right: bool) -> None:
    assert judge(prompt(gold), rf"So $\boxed{{{text}}}$.") == float(right)


@pytest.mark.parametrize(("gold", "text", "right"), TEXTS)
def test_texts(judge: MathVerifier, gold: str, text: str, right: bool) -> None:
    assert judge(prompt(gold), text) == float(right)


@pytest.mark.parametrize(("file", "row", "form", "right"), REAL)
def test_published_answers_in_other_forms(judge: MathVerifier, file: str, row: int, form: str, right: bool) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"the mathematics problems are not beside this checkout ({DATA / file})")
    gold = json.loads((DATA / file).read_text(encoding="utf-8").split("\n")[row])["answer"]
    assert judge(prompt(gold), rf"\boxed{{{form.format(gold)}}}") == float(right)


@pytest.mark.xfail(strict=True, reason="math-verify does not see it, and the response counts as wrong")
@pytest.mark.parametrize(("gold", "text", "why"), MISSED)
def test_missed_answers(judge: MathVerifier, gold: str, text: str, why: str) -> None:
    assert judge(prompt(gold), rf"\boxed{{{text}}}") == 1.0, why


def test_every_verifier_grades_what_follows_the_thinking() -> None:
    exact = ExactVerifier()
    assert exact(prompt("a b"), "<think>c</think> a b") == 1.0
    assert exact(prompt("a b"), "<think>a b</think> c") == 0.0
    assert exact(prompt("a b"), "<think>a b") == 0.0
    from retort.tasks import coached, countdown

    for verifier, row in (
        (CountdownVerifier(), countdown.rows("train", 1)[0]),
        (CoachedVerifier(), coached.rows("train", 1)[0]),
    ):
        right, asked = str(row["response"]), prompt(None, str(row["prompt"]))
        assert verifier(asked, right) == 1.0
        assert verifier(asked, f"<think>{right}</think>{right}") == 1.0
        assert verifier(asked, f"<think>{right}") == verifier(asked, f"<think>{right}</think>") == 0.0


def test_floats_of_the_data_are_read_as_the_same_number() -> None:
    from fractions import Fraction

    for value in (1e-5, 1e20, 0.1, -2.5e-7, 3.0, 1 / 3, 123456789.125, 6.02e23):
        read = number(str(value))
        assert read is not None
        assert read.value == Fraction(str(value))
        assert number(read.exact()) is not None
        assert number(read.exact()).value == read.value  # type: ignore[union-attr]


@pytest.mark.parametrize("gold", ["nan", "inf", "$ $", "9^{9^{9}}", "1" * 600, "x" * 2000, "1e9999"])
def test_an_answer_that_nothing_can_equal_is_named(gold: str) -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    for task in ("math", None):
        with pytest.raises(UserError, match=r"prompt 'row-7': its answer .* cannot be graded"):
            verifier_for(task, [prompt("1"), prompt(gold)])


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9}}",
        "9^9^9",
        "9**9**9",
        "(9^9)!",
        "9!!!!",
        "10000000!",
        "7^{10^{10}}",
        "2^{999999}",
        r"2^{9\cdot10^9}",
        "(" * 99,
    ],
)
def test_what_has_no_end_is_seen_by_its_form(text: str) -> None:
    assert hopeless(text)


@pytest.mark.parametrize(
    "text", ["10^{100}", "2^{2016}", r"\frac{100!}{2^{50}}", "x^{n^2}", "2^{2^{3}}", "e^{-x^2}", "5!!", "3^{-2}"]
)
def test_what_people_write_is_computed(text: str) -> None:
    assert not hopeless(text)


def test_a_batch_of_hopeless_answers_has_one_allowance(judge: MathVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def endless(gold: str, text: str, boxed: bool, digits: int, limit_s: float) -> None:
        limits.append(limit_s)

    with MathVerifier() as own:
        monkeypatch.setattr(own, "_remembered", endless)
        texts = [rf"\boxed{{\sin(x + {n})}}" for n in range(256)]
        for _ in range(2):  # the second batch begins anew
            limits.clear()
            groups = [group_of(replace(prompt(r"\sin x"), id=str(n)), texts[n : n + 4]) for n in range(0, 256, 4)]
            rewards = [rollout.reward for rollout in graded(ByText(own), [one for group in groups for one in group])]
            assert rewards == [0.0] * 256
            assert limits == [own.limit_s] * verify.MOST_GIVEN_UP + [verify.SHORT_LIMIT_S] * (
                256 - verify.MOST_GIVEN_UP
            )
        assert own.given_up == 512


CHILD = r"""
import os, sys, threading
from retort.rewards import MathVerifier
from retort.core.rollouts import Message, Prompt
judge, asked = MathVerifier(limit_s=float(sys.argv[1])), Prompt("0", (Message("user", "?"),), answer="3")
def work():
    judge(asked, r"\boxed{\sqrt{9}}")
    print(judge._process.process.pid, flush=True)
    judge(asked, r"\boxed{\binom{10^{9}}{5\cdot 10^{8}}}")
if sys.argv[2] == "thread":
    thread = threading.Thread(target=work); thread.start(); thread.join()
else:
    work()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("limit", "where"), [("100", "main"), ("2", "thread")])
def test_the_worker_dies_with_a_killed_run(limit: str, where: str) -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    run = subprocess.Popen([sys.executable, "-c", CHILD, limit, where], stdout=subprocess.PIPE)
    assert run.stdout is not None
    session = int(run.stdout.readline())
    deadline = time.monotonic() + 60
    while not _busy(session) and time.monotonic() < deadline:  # until it computes
        time.sleep(0.05)
    assert _members(session)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    while _members(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _members(session)


def _members(session: int) -> list[tuple[int, str]]:
    """Living processes of a session and their states."""
    found: list[tuple[int, str]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((int(entry.name), fields[0]))
    return found


def _busy(session: int) -> bool:
    return any(state == "R" for _, state in _members(session))
