"""The Countdown task: problems, split, solutions and checker."""

import random
import subprocess
import sys
from itertools import permutations
from typing import Any

import pytest

from retort.tasks.countdown import check, rows
from retort.tasks.countdown.problems import Problem, problems, solutions, split_of
from retort.tasks.countdown.rules import CRITERIA, answer, problem_of, verdicts

PROMPT = "45 from 3 5 12 :"


def test_prompt_text() -> None:
    assert Problem((3, 5, 12), 45).prompt == PROMPT


def test_solutions_of_a_small_problem_by_hand() -> None:
    found = solutions(Problem((12, 3, 5), 45))
    assert found == sorted(["12 - 3 = 9 , 5 * 9 = 45", "12 - 3 = 9 , 9 * 5 = 45"])


def test_equal_numbers_are_not_told_apart() -> None:
    assert solutions(Problem((2, 2), 4)) == ["2 * 2 = 4", "2 + 2 = 4"]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_solution_is_right_and_stays_in_range(split: Any) -> None:
    for problem in random.Random(0).sample(problems(split), 300):
        found = solutions(problem)
        assert found and len(set(found)) == len(found)
        for text in found:
            assert check(problem.prompt, text)
            assert all(int(word) <= 255 for word in text.split() if word.isdecimal())


def test_solutions_are_complete_against_brute_force() -> None:
    """Every pair of first and second step that the checker accepts is listed."""
    problem = Problem((4, 6, 6), 30)
    accepted: set[str] = set()
    apply = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for a, b, c in permutations(problem.numbers):
        for first, one in apply.items():
            middle = one(a, b)
            for x, y in ((middle, c), (c, middle)):
                for second, two in apply.items():
                    text = f"{a} {first} {b} = {middle} , {x} {second} {y} = {two(x, y)}"
                    if check(problem.prompt, text):
                        accepted.add(text)
    assert accepted == set(solutions(problem))


def test_four_numbers() -> None:
    for row in rows("train", 30, numbers=4):
        assert check(row["prompt"], row["response"])
        assert len(row["prompt"].split()) == 7


def test_splits_are_disjoint_in_any_order_of_the_numbers() -> None:
    train = {(p.numbers, p.target) for p in problems("train")}
    held_out = {(p.numbers, p.target) for p in problems("held_out")}
    assert not train & held_out
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert len({split_of(Problem(order, 45)) for order in permutations((3, 5, 12))}) == 1
    for split, group in (("train", train), ("held_out", held_out)):
        for row in rows(split, 200):  # type: ignore[arg-type]
            target, _, *numbers, _ = row["prompt"].split()
            assert (tuple(sorted(map(int, numbers))), int(target)) in group


def test_the_split_never_moves() -> None:
    """Pinned: models in the wild were trained on this split."""
    assert (len(problems("train")), len(problems("held_out"))) == (3020, 321)
    first = [row["id"].removeprefix("countdown-") for row in rows("held_out", 3)]
    assert first == ["5-3-4-6", "25-2-5-10", "4-1-1-5"]


def test_rows_are_deterministic_and_a_smaller_count_is_a_prefix() -> None:
    assert rows("held_out", 50) == rows("held_out", 50) == rows("held_out", 80)[:50]
    assert rows("held_out", 50, seed=1) != rows("held_out", 50)
    everything = rows("held_out", None)
    assert len(everything) == len(problems("held_out")) == len({row["id"] for row in everything})
    assert set(everything[0]) == {"id", "prompt", "answer", "response"}
    assert all(row["answer"] == row["prompt"].split()[0] for row in everything)


def test_rows_are_the_same_in_another_process() -> None:
    code = "from retort.tasks.countdown import rows; print(rows('train', 5))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(rows("train", 5))


@pytest.mark.parametrize(
    "response",
    ["12 - 3 = 9 , 9 * 5 = 45", "12-3=9,9*5=45", "  12 - 3\n= 9 ,\t5 * 9 = 45 \n"],
)
def test_right_responses(response: str) -> None:
    assert check(PROMPT, response)
    assert check("45from 3 5 12:", response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "12 - 3 = 9",  # not all numbers used
        "12 - 3 = 9 ,",
        "12 - 3 = 9 , 9 * 5 = 45 ,",
        "12 - 3 = 9 9 * 5 = 45",  # no comma
        "12 - 3 = 9 , 9 * 5 = 46",  # wrong arithmetic
        "12 - 3 = 8 , 8 * 5 = 45",
        "12 - 3 = 9 , 9 * 5 = 45 , 45 + 0 = 45",
        "12 + 3 = 15 , 15 * 3 = 45",  # a number used twice
        "9 * 5 = 45 , 45 + 0 = 45",  # numbers that were not given
        "12 - 3 = 9 , 5 + 9 = 14",  # right, but not the target
        "12 + 3 = 15 , 5 * 9 = 45",  # the second step ignores the first
        "3 - 12 = -9 , 5 * 9 = 45",  # below zero
        "12 - 3 = 09 , 9 * 5 = 45",
        "12 - 3 = 9 , 9 x 5 = 45",
        "12 - 3 = 9 ; 9 * 5 = 45",
        "1 2 - 3 = 9 , 9 * 5 = 45",
        "12 - 3 = 9 , 9 * 5 = 45 <eos>",
        "answer : 12 - 3 = 9 , 9 * 5 = 45",
        "= = = = = , = = = = =",
        ", , , , , , , , , , ,",
    ],
)
def test_wrong_responses(response: str) -> None:
    assert not check(PROMPT, response)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "45",
        "45 from :",
        "45 from 3 5 12",
        "from from 3 5 12 :",
        "45 from 3 5 * :",
        "9 from 3 5 12 :",
        "45 3 5 12 :",
    ],
)
def test_other_prompts(prompt: str) -> None:
    assert not check(prompt, "12 - 3 = 9 , 9 * 5 = 45")


def test_corrupting_any_word_of_a_solution_makes_it_wrong() -> None:
    for row in rows("held_out", 100):
        words = row["response"].split()
        for at, word in enumerate(words):
            changed = str(int(word) + 1) if word.isdecimal() else "="
            if changed != word:
                assert not check(row["prompt"], " ".join([*words[:at], changed, *words[at + 1 :]]))


HOSTILE = ["9" * 5_000_000, " " * 5_000_000, "1+" * 2_000_000, "9" * 900, " " * 999, "\0", "²", "\ud800"]


@pytest.mark.parametrize("text", [*HOSTILE, "٣ + ٥ = ٨", "🙂" * 500], ids=range(10))
def test_hostile_text_is_false(text: str) -> None:
    assert not check(PROMPT, text)
    assert not check(text, "12 - 3 = 9 , 9 * 5 = 45")
    assert not check(text, text)
    assert not check(PROMPT, "12 - 3 = 9 , 9 * 5 = 45" + text + "1")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split"):
        rows("test", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        rows("held_out", 10**9)
    with pytest.raises(ValueError, match="numbers"):
        rows("held_out", 1, numbers=9)


def spoilt(text: str, draw: random.Random) -> str:
    """An answer with one token replaced, left out or there twice."""
    words = text.split()
    place = draw.randrange(len(words))
    words[place : place + 1] = draw.choice(
        [[], [draw.choice("+-*=,")], [str(draw.randrange(30))], [words[place]] * 2, [draw.choice(words)]]
    )
    return " ".join(words)


def test_all_criteria_hold_for_right_answers_and_for_no_others() -> None:
    draw, seen = random.Random(0), set[tuple[bool, ...]]()
    for problem in draw.sample(problems("train"), 200):
        right = answer(problem, draw.randrange(1000))
        for text in (right, *(spoilt(right, draw) for _ in range(20)), spoilt(spoilt(right, draw), draw)):
            found = verdicts(problem, text)
            assert len(found) == len(CRITERIA)
            assert all(found) == check(problem.prompt, text), text
            seen.add(tuple(found))
    for place, (name, *_) in enumerate(CRITERIA):
        assert {own[place] for own in seen} == {True, False}, f"{name} tells nothing apart"


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("12 - 3 = 9 , 9 * 5 = 45", "form given arithmetic all target"),
        ("12 - 3 = 9 , 9 * 5 = 46", "form given all"),
        ("12 - 3 = 9", "form given arithmetic"),
        ("9 * 5 = 45", "form arithmetic target"),
        ("so 12 - 3 = 9 , 9 * 5 = 45", "given arithmetic all target"),
        ("45", ""),
        ("", ""),
        ("12 - 3 = 9 , 9 * 5 = 45" + " " * 1000, ""),
    ],
)
def test_criteria_by_hand(text: str, holds: str) -> None:
    found = verdicts(Problem((3, 5, 12), 45), text)
    assert " ".join(name for (name, *_), own in zip(CRITERIA, found, strict=True) if own) == holds


@pytest.mark.parametrize("text", [PROMPT, " 45  from 3 5 12: ", "45 from 12 5 3 :"])
def test_a_problem_is_read_from_its_prompt(text: str) -> None:
    found = problem_of(text)
    assert found is not None and (found.target, sorted(found.numbers)) == (45, [3, 5, 12])


@pytest.mark.parametrize("text", ["", "45", "45 from 3 :", "say 45 from 3 5 :", PROMPT + " 12 - 3 = 9", "4" * 2000])
def test_what_states_no_problem_has_none(text: str) -> None:
    assert problem_of(text) is None


def test_an_answer_is_right_and_there_are_several() -> None:
    problem = Problem((1, 2, 3), 6)
    found = {answer(problem, seed) for seed in range(20)}
    assert len(found) > 3 and all(check(problem.prompt, text) for text in found)
    assert answer(Problem((1, 1), 50), 0) == ""
