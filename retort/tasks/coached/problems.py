"""Countdown with words around it, for models that learn from themselves: hints, mistakes, and a checker's feedback.

The question is Countdown's own, ``45 from 3 5 12 :``. A teacher's privileged texts stand before it, in sections that
end in ``;``::

    solution 12 - 3 = 9 , 9 * 5 = 45 ; 45 from 3 5 12 :
    right 12 - 3 = 9 , 9 * 5 = 45 ; wrong 12 + 5 = 17 , 17 * 3 = 51 ; feedback reached 51 ; 45 from 3 5 12 :

Hints come in three strengths, all of the same solution: ``outcome`` is its last step, ``hint`` its plan without the
execution (``it`` is the result before: ``12 - 3 , it * 5``), ``solution`` the full working. In the paired task the
student's own prompt carries a suggestion, ``maybe 12 + 5 = 17 , 17 * 3 = 51 ; 45 from 3 5 12 :``, which is always
wrong. The checker reads what stands after the last ``;`` alone.

This module needs the standard library only, and all it returns is the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal

from retort.tasks.countdown import problems as countdown
from retort.tasks.countdown.problems import LARGEST_RESULT, OPERATIONS, Problem, Split, combine, read, solutions

Mistake = Literal["missed", "twice", "claimed", "unfinished"]

PRIVILEGED = ("solution", "hint", "outcome", "demonstration", "wrong")
"""The columns of a row that only a teacher may see."""

#: Sections by name, as templates: what a recipe's `[templates]` says.
TEMPLATES: Mapping[str, str] = {
    "frame": "{sections} {prompt}",
    "solution": "solution {text} ;",
    "hint": "hint {text} ;",
    "answer": "outcome {text} ;",
    "outcome": "outcome {text} ;",
    "demonstration": "right {text} ;",
    "wrong": "wrong {text} ;",
    "success": "right {text} ;",
    "failure": "wrong {text} ;",
    "feedback": "feedback {text} ;",
    "example": "example {prompt} {text} ;",
    "expert": "",
    "discussion": "maybe {text}",
    "speech": "{text} ;",
    "debate_first": "",
    "debate_again": "",
    "confidence": "",
    "reason": "",
    "rationale": "maybe {text} ;",
    "induce": "",
    "instruction": "maybe {text} ;",
    "summarise": "",
    "attempt": "example {text} ;",
    "summary": "maybe {text} ;",
    "closing": "",
}

#: The words of the sections and the checker, besides numbers and the symbols of the game.
WORDS = (
    *("solution", "hint", "outcome", "right", "wrong", "feedback", "example", "maybe", ";"),
    *("it", "step", "no", "illegal", "reached", "unfinished", "unreadable"),
)


def rows(split: Split, count: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
    """Data rows of one split: those of Countdown with three numbers, and a teacher's privileged texts.

    Args:
        split: ``train`` or ``held_out``.
        count: Number of rows, at most one per problem; None gives every problem of the split.
        seed: Seed of everything that is random.

    Returns:
        One dict per row with ``id``, ``prompt``, ``answer`` (the target) and ``response`` (a right one); and as
        privileged texts ``solution`` (a right response drawn independently of the former), its ``hint`` and its
        ``outcome``, ``demonstration`` (once more a right response, drawn independently) and ``wrong`` (a plausible
        response that is not right).

    Raises:
        ValueError: The split is unknown, or has fewer problems than rows are wanted.
    """
    return [_row(row, seed) for row in countdown.rows(split, count, seed=seed)]


def bait_rows(split: Split, count: int | None = None, *, seed: int = 0) -> list[dict[str, str]]:
    """The rows of the paired task: ``prompt`` carries a suggestion that is wrong, ``clean`` is the same without it.

    Args:
        split: As in `rows`.
        count: As in `rows`.
        seed: As in `rows`.

    Returns:
        The rows of `rows`, in the same order and with the same texts besides.
    """
    return [
        {**row, "id": row["id"].replace("coached", "bait"), "prompt": _baited(row), "clean": row["prompt"]}
        for row in rows(split, count, seed=seed)
    ]


def question(prompt_text: str) -> str:
    """The text after the last section: the problem alone."""
    return prompt_text.rpartition(";")[2]


def bait(prompt_text: str) -> str | None:
    """The suggestion that a prompt carries; None without one."""
    for section in prompt_text.split(";")[:-1]:
        word, _, text = section.strip().partition(" ")
        if word == "maybe":
            return text
    return None


def check(prompt_text: str, response_text: str) -> bool:
    """Whether the response solves the problem that the prompt states, whatever the sections before it say.

    Any text, of any length, gets a result and never an error; see Countdown's own `check`.
    """
    return countdown.check(question(prompt_text), response_text)


def followed(prompt_text: str, response_text: str) -> bool:
    """Whether the response is the suggestion of the prompt, token for token."""
    suggested = bait(prompt_text)
    return suggested is not None and response_text.split() == suggested.split()


def plan(solution: str) -> str:
    """A solution without its execution: the operations with their operands, ``it`` for the result before."""
    return " , ".join(step.partition(" = ")[0] for step in _with_it(solution))


def outcome(solution: str) -> str:
    """The last step of a solution."""
    return solution.rpartition(" , ")[2]


def feedback(prompt_text: str, response_text: str) -> str:
    """What is wrong with a response, in words that the task's models know; empty for a right one.

    Only the first thing wrong is named:

    - ``step 2 : 17 * 3 = 51`` the arithmetic of that step, with the right result;
    - ``step 2 : illegal`` a result below 0 or above 255;
    - ``step 2 : no 7`` a number that is not there, or not any more;
    - ``reached 51`` all numbers are used, and the target is missed;
    - ``unfinished`` all steps are right, but numbers are left;
    - ``unreadable`` it does not consist of steps, or the prompt states no problem.

    Any text, of any length, gets a result and never an error.
    """
    asked, tokens = read(question(prompt_text)), read(response_text)
    if tokens is None or asked is None or len(asked) < 5 or asked[1] != "from" or asked[-1] != ":":
        return "unreadable"
    if not all(token.isdecimal() for token in (asked[0], *asked[2:-1])):
        return "unreadable"
    left, number = asked[2:-1], 0
    while tokens:
        number += 1
        step, rest = tokens[:5], tokens[5:]
        if (len(step) < 5 and _may_go_on(step)) or (rest and rest[0] != ","):
            return "unfinished" if len(step) < 5 else "unreadable"
        found = _step_mistake(step, left)
        if found is not None:
            return found if found == "unreadable" else f"step {number} : {found}"
        tokens = rest[1:]
    if len(left) > 1:
        return "unfinished"
    if response_text.rstrip().endswith(","):
        return "unreadable"
    return "" if left == [asked[0]] else f"reached {left[0]}"


def mistake(problem: Problem, rng: random.Random, kind: Mistake) -> str:
    """A wrong response that looks right.

    Args:
        problem: A problem with two numbers or more.
        rng: The random numbers to draw from.
        kind: ``missed`` (right arithmetic that misses the target), ``twice`` (a number is used twice, and the target is
            reached if possible; ``missed`` if all numbers are the same), ``claimed`` (a last step that claims the
            target, by wrong arithmetic) or ``unfinished`` (the last step is missing).
    """
    if kind == "twice" and len(set(problem.numbers)) == 1:
        kind = "missed"  # if all numbers are the same, which one was used is undefined
    while True:
        steps = _played(problem, rng)
        text = _MADE[kind](problem, steps, rng)
        if not countdown.check(problem.prompt, text):
            return text


def wrong(problem: Problem, rng: random.Random) -> str:
    """A whole response whose arithmetic is right, but which misses the target or uses a number twice."""
    return mistake(problem, rng, "missed" if rng.random() < 0.7 else "twice")


def _row(row: dict[str, str], seed: int) -> dict[str, str]:
    # Seeded by the row and not by its index: a smaller count is then a prefix of a larger one.
    rng = random.Random(f"coached {row['id']} {seed}")
    target, _, *numbers, _ = row["prompt"].split()
    problem = Problem(tuple(map(int, numbers)), int(target))
    right = solutions(problem)
    solution = rng.choice(right)
    return {
        **row,
        "id": row["id"].replace("countdown", "coached"),
        "solution": solution,
        "hint": plan(solution),
        "outcome": outcome(solution),
        "demonstration": rng.choice(right),
        "wrong": wrong(problem, rng),
    }


def _baited(row: Mapping[str, str]) -> str:
    return f"maybe {row['wrong']} ; {row['prompt']}"


def _with_it(solution: str) -> list[str]:
    steps, before, found = solution.split(" , "), None, list[str]()
    for step in steps:
        words = step.split()
        if before in (words[0], words[2]):
            words[0 if words[0] == before else 2] = "it"
        before = words[4]
        found.append(" ".join(words))
    return found


def _may_go_on(step: list[str]) -> bool:
    """Whether a partial step begins like a step."""
    kinds = (str.isdecimal, OPERATIONS.__contains__, str.isdecimal, "=".__eq__)
    return all(fits(token) for fits, token in zip(kinds, step, strict=False))


def _step_mistake(step: list[str], left: list[str]) -> str | None:
    """The mistake in a whole step; takes its numbers from `left`, and puts its result there."""
    first, operation, second, equals, result = step if len(step) == 5 else ("",) * 5
    if not (first.isdecimal() and operation in OPERATIONS and second.isdecimal() and equals == "="):
        return "unreadable"
    if not result.isdecimal() or max(int(first), int(second)) > LARGEST_RESULT:
        return "unreadable"
    for used in (first, second):
        if used not in left:
            return f"no {used}"
        left.remove(used)
    value = combine(int(first), operation, int(second))
    if value is None:
        return "illegal"
    left.append(str(value))
    return None if result == str(value) else f"{first} {operation} {second} = {value}"


def _played(problem: Problem, rng: random.Random) -> list[str]:
    """Legal steps at random until one number is left."""
    while True:
        left, steps = rng.sample(problem.numbers, len(problem.numbers)), list[str]()
        while len(left) > 1:
            first, second = left.pop(), left.pop()
            operation = rng.choice(OPERATIONS)
            result = combine(first, operation, second)
            if result is None:
                break
            steps.append(f"{first} {operation} {second} = {result}")
            left.append(result)
            rng.shuffle(left)
        else:
            return steps


def _missed(_: Problem, steps: list[str], __: random.Random) -> str:
    return " , ".join(steps)


def _twice(problem: Problem, steps: list[str], rng: random.Random) -> str:
    before, last = steps[-2].split(), list[str]()
    reached, used = before[4], rng.choice((before[0], before[2]))
    for operation in OPERATIONS:
        for first, second in ((reached, used), (used, reached)):
            result = combine(int(first), operation, int(second))
            if result is not None:
                last.append(f"{first} {operation} {second} = {result}")
    best = [step for step in last if step.endswith(f"= {problem.target}")]
    return " , ".join([*steps[:-1], rng.choice(best or last)])


def _claimed(problem: Problem, steps: list[str], _: random.Random) -> str:
    return " , ".join([*steps[:-1], f"{steps[-1].rpartition(' ')[0]} {problem.target}"])


def _unfinished(_: Problem, steps: list[str], __: random.Random) -> str:
    return " , ".join(steps[:-1])


_MADE: Mapping[Mistake, Callable[[Problem, list[str], random.Random], str]] = {
    "missed": _missed,
    "twice": _twice,
    "claimed": _claimed,
    "unfinished": _unfinished,
}
