from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.core.rollouts import Message, Prompt
from retort.data import load_prompts
from retort.errors import RunError, UserError
from retort.rewards import CountdownVerifier, ExactVerifier, MathVerifier, math_process, verifier_for
from retort.rewards.verify import last_boxed

PROBLEMS = Path(__file__).parents[2] / "../shared/data/math"
LIMIT = 2.0


def prompt(answer: str | None, text: str = "?", name: str = "0") -> Prompt:
    return Prompt(name, (Message("user", text),), answer=answer)


@pytest.fixture(scope="module")
def judge() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    with MathVerifier() as verifier:
        yield verifier


def problems(file: str, limit: int) -> list[Prompt]:
    path = PROBLEMS / file
    if not path.exists():
        pytest.skip(f"the mathematics problems are not beside this checkout ({path})")
    return load_prompts(str(path), limit=limit, columns={"prompt": "problem"})


def test_exact() -> None:
    exact = ExactVerifier()
    assert exact(prompt("a  b"), " a\nb ") == 1.0
    assert exact(prompt("a b"), "ab") == 0.0
    with pytest.raises(UserError, match="prompt 'x' has no answer"):
        exact(prompt(None, name="x"), "a")


def test_countdown() -> None:
    from retort.tasks.countdown import check, rows

    row = rows("train", 1)[0]
    assert CountdownVerifier()(prompt(None, row["prompt"]), "nonsense") == 0.0
    right = row.get("solution") or row.get("response")
    assert right is not None
    assert check(row["prompt"], right)
    assert CountdownVerifier()(prompt(None, row["prompt"]), right) == 1.0


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \fbox{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{5 and \boxed{6", None),
        (r"\boxed{} ", ""),
        ("nothing", None),
    ],
)
def test_last_boxed(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("72", r"So $\boxed{72}$."),
        ("72", "The answer is 72."),
        ("72", "72"),
        ("073", r"\boxed{73}"),
        ("1000", r"\boxed{1,000}"),
        ("18", r"\boxed{\$18}"),
        ("0.5", r"\boxed{\frac12}"),
        (r"\frac{14}{3}", r"\boxed{14/3}"),
        (r"$\boxed{4}$", r"\boxed{3+1}"),
        ("p - q", r"\boxed{-q+p}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}"),
        ("1,2", r"\boxed{2,1}"),
        (r"\frac{14}{3}", "so it is 14/3."),
        ("4", r"\boxed{4} and then \boxed{5"),
    ],
)
def test_right_answers(judge: MathVerifier, answer: str, text: str) -> None:
    assert judge(prompt(answer), text) == 1.0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("72", r"\boxed{73}"),
        ("2", r"\boxed{1, 2, 3}"),
        ("2", r"2 \boxed{3}"),
        ("2", r"\boxed{2} \boxed{3}"),
        ("5", r"\boxed{x}"),
        ("x", r"\boxed{5}"),
        ("5", r"\boxed{}"),
        ("5", ""),
        ("5", "I do not know"),
    ],
)
def test_wrong_answers(judge: MathVerifier, answer: str, text: str) -> None:
    assert judge(prompt(answer), text) == 0.0


@pytest.mark.parametrize(("file", "count"), [("math500.jsonl", 50), ("gsm8k_test.jsonl", 50), ("amc23.jsonl", 40)])
def test_published_answers_verify_and_others_do_not(judge: MathVerifier, file: str, count: int) -> None:
    rows = problems(file, count)
    # Rows seven apart: of neighbours, one asks for 5 and the other for x=5, which are rightly held for equal.
    for row, other in zip(rows, rows[7:] + rows[:7], strict=True):
        assert row.answer is not None
        assert judge(row, rf"Hence the answer is $\boxed{{{row.answer}}}$.") == 1.0
        # Not by equal strings alone: math-verify itself must hold the answer for equal to itself.
        assert judge._process.equal(row.answer, row.answer, True, 6, 5.0)
        if other.answer != row.answer:
            assert judge(row, rf"\boxed{{{other.answer}}}") == 0.0


def test_published_solutions_verify(judge: MathVerifier) -> None:
    rows = problems("gsm8k_test.jsonl", 50)
    wrong = [row.id for row in rows if not judge(row, row.privileged["solution"])]
    # In these two the last number of the solution is not its answer ("15 liters of water out of the 24 liters").
    assert wrong == ["gsm8k/test/20", "gsm8k/test/35"]
    for row in rows:
        assert judge(row, row.privileged["solution"] + f"\nThe answer is {row.answer}.") == 1.0


# Not to be seen by its form: only the limit of processor time ends it.
ENDLESS = r"\boxed{\binom{10^{9}}{5\cdot 10^{8}}}"

HOSTILE = {
    "deep": r"\boxed{" + "{" * 450 + "1" + "}" * 450 + "}",
    "many boxes": r"\boxed{" * 200_000,
    "brackets": "(" * 1_000_000,
    "digits": "1" * 1_000_000,
    "half a character": "\\boxed{\x00\ud83d}",
    "fractions": r"\frac{" * 200,
    "equations": "=1" * 1000,
    "dollars": "$" * 5000,
    "newlines": '\\boxed{\n\n{"equal": true}\n}',
}


@pytest.fixture(scope="module")
def limited() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    with MathVerifier(LIMIT) as verifier:
        yield verifier


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_wrong(limited: MathVerifier, text: str) -> None:
    new = 5 + [*HOSTILE.values()].index(text)
    limited(prompt("3"), rf"\boxed{{\sqrt{{{new}}}}}")  # starts the worker, if the text before has ended it
    assert limited(prompt("3"), text) == 0.0


def test_endless_work_is_given_up_and_judging_goes_on() -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    with MathVerifier(LIMIT) as judge:
        assert judge(prompt("3"), r"\boxed{1+\sqrt{4}}") == 1.0
        assert judge(prompt("3"), r"\boxed{9^{9^{9}}}") == 0.0
        assert judge.given_up == 1  # by its form, without a try
        assert judge(prompt("3"), ENDLESS) == 0.0
        assert judge(prompt("3"), ENDLESS) == 0.0  # remembered, and counted
        assert judge.given_up == 3
        assert judge(prompt("3"), r"\boxed{\sqrt{9}}") == 1.0


def test_a_dead_worker_is_replaced(judge: MathVerifier) -> None:
    judge(prompt("3"), r"\boxed{\sqrt{9}}")
    process = judge._process.process
    assert process is not None
    process.kill()
    process.wait()
    assert judge(prompt("3"), r"\boxed{1+\sqrt{4}}") == 1.0
    judge.close()
    assert judge(prompt("3"), r"\boxed{2+\sqrt{1}}") == 1.0


def test_works_from_threads_and_quietly(
    judge: MathVerifier, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    found: dict[int, float] = {}

    def work(number: int) -> None:
        found[number] = judge(prompt(str(number)), rf"\boxed{{\sqrt{{{number * number}}}}}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), 1.0)
    judge(prompt("1"), r"\boxed{\frac{}{}{")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_worker_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    script = tmp_path / "worker.py"
    monkeypatch.setattr(math_process, "WORKER", script)
    script.write_text(f"print({json.dumps(json.dumps({'error': 'ImportError: no sympy'}))})")
    with pytest.raises(RunError, match="ImportError: no sympy"):
        MathVerifier()(prompt("3"), r"\boxed{\sqrt{9}}")
    script.write_text("")
    with pytest.raises(RunError, match="did not start"):
        MathVerifier()(prompt("3"), r"\boxed{\sqrt{9}}")


def test_verifier_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with_answer, without = prompt("1"), prompt(None, name="bare")
    assert isinstance(verifier_for("countdown", [without]), CountdownVerifier)
    assert isinstance(verifier_for("exact", [with_answer]), ExactVerifier)
    assert verifier_for(None, [with_answer, without]) is None
    assert verifier_for(None, []) is None
    with pytest.raises(UserError, match="prompt 'bare' has no answer"):
        verifier_for("exact", [with_answer, without])
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        verifier_for("countdwn", [])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for task in ("math", None):
        with pytest.raises(UserError, match="retort-distill\\[math\\]"):
            verifier_for(task, [with_answer])


def test_verifier_for_mathematics() -> None:
    pytest.importorskip("math_verify", reason="needs the extra `math`")
    for task in ("math", None):
        verifier = verifier_for(task, [prompt("1")])
        assert isinstance(verifier, MathVerifier)
        assert verifier.name == "math"
