"""Countdown: reach a target from given numbers, each used exactly once, one step of text at a time.

A prompt reads ``45 from 3 5 12 :`` and a right response ``12 - 3 = 9 , 9 * 5 = 45``. A step takes two numbers that are
left, combines them with ``+``, ``-`` or ``*``, and replaces them by the result; the last result is the target. Every
result lies in 0..255, so one token per number covers the whole game.

Most problems have many right responses. A model trained on random ones is rightly uncertain about which number and
which operation comes next (a fork), and certain about the arithmetic in between.

This module needs the standard library only, and all its results are the same on every machine.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Literal

Split = Literal["train", "held_out"]

LARGEST_RESULT = 255
LARGEST_NUMBER = 12
LARGEST_TARGET = 60
OPERATIONS = ("+", "-", "*")
HELD_OUT_SHARE = 0.1

_MOST_CHARACTERS = 1000  # longer text is wrong, and refused before any of it is read
_TOKEN = re.compile(r"\s*(0(?![0-9])|[1-9][0-9]{0,2}(?![0-9])|from\b|[-+*=,:])")


@dataclass(frozen=True)
class Problem:
    """One problem: the numbers, in the order in which the prompt shows them, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """The text that a model has to continue, such as ``45 from 3 5 12 :``."""
        return f"{self.target} from {' '.join(map(str, self.numbers))} :"


def solutions(problem: Problem) -> list[str]:
    """All right responses to ``problem``, sorted, without duplicates.

    ``3 + 5`` and ``5 + 3`` are both listed, and so are two independent steps in either order: to the checker, and to a
    model that has to generate one of them, these are different texts. Equal numbers are not distinguished, so no text
    counts twice.
    """
    return sorted({" , ".join(steps) for steps in _ways(tuple(sorted(problem.numbers)), problem.target)})


@cache
def problems(
    split: Split,
    numbers: int = 3,
    *,
    largest_number: int = LARGEST_NUMBER,
    largest_target: int = LARGEST_TARGET,
) -> tuple[Problem, ...]:
    """All solvable problems of one split, each once with its numbers in ascending order.

    Args:
        split: ``train`` or ``held_out``.
        numbers: Number of numbers of a problem.
        largest_number: The task has numbers in 1..12; a wider range is for training a teacher.
        largest_target: The task has targets in 1..60.
    """
    return tuple(
        Problem(given, target)
        for given in combinations_with_replacement(range(1, largest_number + 1), numbers)
        for target in sorted(_reachable(given))
        if 1 <= target <= largest_target and split_of(Problem(given, target)) == split
    )


def split_of(problem: Problem) -> Split:
    """The split that ``problem`` belongs to, whatever the order of its numbers.

    A hash of the sorted numbers and the target decides, so no training set, however large, holds a held-out
    problem.
    """
    text = f"countdown {sorted(problem.numbers)} {problem.target}"
    fraction = hashlib.sha256(text.encode()).digest()[0] / 256
    return "held_out" if fraction < HELD_OUT_SHARE else "train"


def rows(split: Split, count: int | None = None, *, numbers: int = 3, seed: int = 0) -> list[dict[str, str]]:
    """Data rows of one split, in random order and with the numbers of each problem in random order.

    Args:
        split: ``train`` or ``held_out``.
        count: Number of rows, at most one per problem; None gives every problem of the split.
        numbers: Number of numbers of a problem.
        seed: Seed of the choice of problems, their order, the order of their numbers, and the response.

    Returns:
        One dict per row with ``id``, ``prompt``, ``answer`` (the target) and ``response``, one right solution
        drawn uniformly from all of them.

    Raises:
        ValueError: The split is unknown, has too few problems, or ``numbers`` is not 2, 3 or 4.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    if not 2 <= numbers <= 4:
        raise ValueError(f"numbers must be 2, 3 or 4, not {numbers}")
    pool = problems(split, numbers)
    if count is not None and not 0 <= count <= len(pool):
        raise ValueError(f"count must lie in 0..{len(pool)}, the problems of this split, not {count}")
    rng = random.Random(f"countdown {split} {numbers} {seed}")
    chosen = rng.sample(pool, len(pool))[:count]  # a smaller count is a prefix of a larger one
    return [_row(problem, rng) for problem in chosen]


def check(prompt_text: str, response_text: str) -> bool:
    """Whether the response solves the problem that the prompt states.

    Every step must be arithmetically right and use only numbers that are left, the last result must be the target, and
    every given number must be used exactly once. Spaces and line breaks do not matter. Any other text, of any length,
    is False and never an error.
    """
    prompt, response = read(prompt_text), read(response_text)
    if prompt is None or response is None or len(prompt) < 5 or prompt[1] != "from" or prompt[-1] != ":":
        return False
    target, given = prompt[0], prompt[2:-1]
    if not all(token.isdecimal() for token in (target, *given)) or len(response) != 6 * (len(given) - 1) - 1:
        return False
    left, result = list(given), ""
    for start in range(0, len(response), 6):  # a step is five tokens, and a comma separates it from the next
        first, operation, second, equals, result, *comma = (*response[start : start + 6],)
        if equals != "=" or comma not in ([], [","]) or not (first.isdecimal() and second.isdecimal()):
            return False
        if first not in left:
            return False
        left.remove(first)
        if second not in left or result != str(combine(int(first), operation, int(second))):
            return False
        left.remove(second)
        left.append(result)
    return result == target


def _row(problem: Problem, rng: random.Random) -> dict[str, str]:
    shown = Problem(tuple(rng.sample(problem.numbers, len(problem.numbers))), problem.target)
    name = "-".join(map(str, (problem.target, *problem.numbers)))
    return {
        "id": f"countdown-{name}",
        "prompt": shown.prompt,
        "answer": str(shown.target),
        "response": rng.choice(solutions(shown)),
    }


def read(text: str) -> list[str] | None:
    """The tokens of ``text``, or None where it is too long or holds anything that is no token."""
    if len(text) > _MOST_CHARACTERS:
        return None
    text, at, found = text.rstrip(), 0, list[str]()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        found.append(match[1])
        at = match.end()
    return found


def combine(first: int, operation: str, second: int) -> int | None:
    """The result of one step, or None where the game forbids it."""
    if operation == "+":
        result = first + second
    elif operation == "-":
        result = first - second
    elif operation == "*":
        result = first * second
    else:
        return None
    return result if 0 <= result <= LARGEST_RESULT else None


def _moves(left: tuple[int, ...]) -> Iterator[tuple[int, str, int, int, tuple[int, ...]]]:
    """Every legal step from ``left``: first, operation, second, result, and the sorted numbers after it."""
    for i, first in enumerate(left):
        for j, second in enumerate(left):
            if i == j:
                continue
            rest = [number for k, number in enumerate(left) if k not in (i, j)]
            for operation in OPERATIONS:
                result = combine(first, operation, second)
                if result is not None:
                    yield first, operation, second, result, tuple(sorted((*rest, result)))


@cache
def _reachable(left: tuple[int, ...]) -> frozenset[int]:
    """Every number that can be made of all of ``left``, sorted."""
    if len(left) == 1:
        return frozenset(left)
    return frozenset[int]().union(*(_reachable(after) for *_, after in _moves(left)))


def _ways(left: tuple[int, ...], target: int) -> Iterator[tuple[str, ...]]:
    """Every sequence of steps, as texts, from the sorted numbers ``left`` to ``target``."""
    if left == (target,):
        yield ()
    for first, operation, second, result, after in _moves(left):
        if target in _reachable(after):
            for later in _ways(after, target):
                yield (f"{first} {operation} {second} = {result}", *later)
