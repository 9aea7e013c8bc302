"""Countdown's criteria: what can be said by rule of an answer that need not be right."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from retort.tasks.countdown.problems import OPERATIONS, Problem, combine, read, solutions

#: Id, words, category and points of each criterion. All of them hold for right answers, and for no others.
CRITERIA = (
    ("form", "The answer is steps such as 12 - 3 = 9, with a comma between two, and nothing else.", "quality", 1),
    ("given", "Every step takes two numbers that are given or made by an earlier step, and left.", "task", 4),
    ("arithmetic", "Every step is computed right, and its result lies in 0..255.", "reasoning", 3),
    ("all", "The steps use up all the given numbers.", "task", 2),
    ("target", "The result of the last step is the target.", "task", 5),
)
_PROBLEM = re.compile(r"\s*([0-9]{1,3})\s+from((?:\s+[0-9]{1,3}){2,4})\s*:\s*")
_STEP = re.compile(r"([0-9]{1,3})\s*([-+*])\s*([0-9]{1,3})\s*=\s*([0-9]{1,3})")
_MOST_CHARACTERS = 1000


@dataclass(frozen=True)
class _Step:
    first: int
    operation: str
    second: int
    result: int


def problem_of(text: str) -> Problem | None:
    """The problem that a prompt states; None if it states none.

    Args:
        text: The whole prompt, such as ``45 from 3 5 12 :``.
    """
    found = _PROBLEM.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    return None if found is None else Problem(tuple(map(int, found[2].split())), int(found[1]))


def verdicts(problem: Problem, text: str) -> list[bool]:
    """Whether each of `CRITERIA` holds for an answer. A text without a step, or a very long one, meets none.

    Args:
        problem: The problem.
        text: Any text.
    """
    text = text if len(text) <= _MOST_CHARACTERS else ""
    steps = [_Step(int(one[1]), one[2], int(one[3]), int(one[4])) for one in _STEP.finditer(text)]
    if not steps:
        return [False] * len(CRITERIA)
    left, available = list(problem.numbers), True
    for step in steps:
        for number in (step.first, step.second):
            available = available and number in left
            if number in left:
                left.remove(number)
        left.append(step.result)
    return [
        _well_formed(text, steps),
        available,
        all(combine(step.first, step.operation, step.second) == step.result for step in steps),
        available and len(left) == 1,
        steps[-1].result == problem.target,
    ]


def answer(problem: Problem, seed: int) -> str:
    """A right answer, drawn uniformly from all of them; empty where the problem has none."""
    found = solutions(problem)
    return random.Random(f"countdown {seed}").choice(found) if found else ""


def _well_formed(text: str, steps: list[_Step]) -> bool:
    tokens = read(text)
    if tokens is None or len(tokens) != 6 * len(steps) - 1:
        return False
    return all(
        token == "," if place % 6 == 5 else token == "=" if place % 6 == 3 else _fits(token, place % 6)
        for place, token in enumerate(tokens)
    )


def _fits(token: str, place: int) -> bool:
    return token in OPERATIONS if place == 1 else token.isdecimal()
