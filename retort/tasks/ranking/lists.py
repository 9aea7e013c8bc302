"""Ranked JSON lists: read items with their ranks, write them as a JSON list in order.

A prompt reads ``rank 3 "k" 1 "c" 4 "a" 2 "t" :`` and the right response is
``[ { "score" : 1 , "id" : "c" } , { "score" : 2 , "id" : "t" } , ... ]``. Most of the response is structure that a
Most of the response is structure that a trained model is almost certain of, and the rest (which item comes next, and
whether one comes at all: lists have four to six) decides the quality. The two are scored apart: whether a response can
be parsed at all, and how good its ranking is.

This module needs the standard library only, and all its results are the same on every machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "held_out"]

IDS = tuple("abcdefghijklmnopqrstuvwxyz")
ITEMS = (4, 5, 6)

_MOST_CHARACTERS = 2000  # longer text is wrong, and refused before any of it is read


@dataclass(frozen=True)
class Problem:
    """One problem: the items with their ranks (1 is best), in the order in which the prompt shows them."""

    items: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """The text that a model has to continue."""
        return f"rank {' '.join(f'{rank} {json.dumps(name)}' for name, rank in self.items)} :"

    @property
    def response(self) -> str:
        """The right response."""
        ranked = sorted(self.items, key=lambda item: item[1])
        objects = [f'{{ "score" : {rank} , "id" : {json.dumps(name)} }}' for name, rank in ranked]
        return f"[ {' , '.join(objects)} ]"


@dataclass(frozen=True)
class ListScore:
    """The scores of one response.

    Attributes:
        parses: A JSON list of exactly as many objects as there were items, with every id once and a number for a score.
        ndcg: NDCG@1, between 0 and 1: the gain of the item put first, where the best of n has gain 1 and the others
            (n - 1) / n and so on; None if it does not parse.
        one_missing: Whether all but one of the given ids occur, and nothing else is wrong.
    """

    parses: bool
    ndcg: float | None = None
    one_missing: bool = False


def problem(rng: random.Random, items: int | None = None) -> Problem:
    """A random problem, with a random number of items if none is given."""
    count = rng.choice(ITEMS) if items is None else items
    ranks = rng.sample(range(1, count + 1), count)
    return Problem(tuple(zip(rng.sample(IDS, count), ranks, strict=True)))


def rows(split: Split, count: int | None) -> list[dict[str, Any]]:
    """Rows of a data file; held-out ones come from another stream, and no training problem is among them.

    Args:
        split: The split.
        count: Number of rows; 4096 (train) or 512 (held out) if None.
    """
    held_out = _drawn("held_out", 512, frozenset())
    chosen = held_out if split == "held_out" else _drawn("train", 4096, frozenset(held_out))
    return [
        {"id": f"{split}-{index}", "prompt": one.prompt, "answer": one.response, "response": one.response}
        for index, one in enumerate(chosen[:count])
    ]


def _drawn(split: Split, count: int, without: frozenset[Problem]) -> list[Problem]:
    rng, found = random.Random(f"ranking {split}"), dict[Problem, None]()
    while len(found) < count:
        one = problem(rng)
        if one not in without:
            found[one] = None
    return list(found)


def score_list(prompt: str, text: str) -> ListScore:
    """Scores a response to the problem that a prompt states; it neither raises nor hangs on any text.

    Args:
        prompt: A text with the one of `Problem.prompt`, perhaps among other words.
        text: The response; its outermost brackets are read, as in the paper.
    """
    ranks = _ranks(prompt)
    start, end = text.find("["), text.rfind("]")
    if not ranks or len(text) > _MOST_CHARACTERS or start < 0 or end < start:
        return ListScore(False)
    try:
        objects = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return ListScore(False)
    names = _names(objects)
    if names is None or len(set(names)) != len(names) or not set(names) <= set(ranks):
        return ListScore(False)
    if len(names) != len(ranks):
        return ListScore(False, one_missing=len(names) == len(ranks) - 1)
    return ListScore(True, ndcg=1.0 - (ranks[names[0]] - 1) / len(ranks))


def check(prompt: str, text: str) -> bool:
    """Whether a response parses: the measure that drops at the cliff."""
    return score_list(prompt, text).parses


def _names(objects: Any) -> Sequence[str] | None:
    """The ids in order, or None if the objects are not of the requested form."""
    if not isinstance(objects, list):
        return None
    names: list[str] = []
    for one in objects:
        if not isinstance(one, dict) or set(one) != {"id", "score"} or not isinstance(one["id"], str):
            return None
        if isinstance(one["score"], bool) or not isinstance(one["score"], int | float):
            return None
        names.append(one["id"])
    return names


def _ranks(prompt: str) -> dict[str, int]:
    words = prompt.split()
    if "rank" not in words or words[-1] != ":":
        return {}
    words = words[words.index("rank") + 1 : -1]
    pairs = zip(words[::2], words[1::2], strict=False)
    return {name.strip('"'): int(rank) for rank, name in pairs if rank.isdecimal()}
