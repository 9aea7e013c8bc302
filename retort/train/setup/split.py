"""Splits prompts into training and held-out ones so that none is in both."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from retort.core.rollouts import Message, Prompt
from retort.errors import counted

#: The identity of a prompt: role and text of each message, and what else templates read.
Content = tuple[tuple[str, ...], ...]


def content(prompt: Prompt) -> Content:
    """The content of a prompt: roles and texts of its messages, with composed characters and single spaces, and tools.

    Case counts (`x` and `X` may be two unknowns), and so do a system message and each image. Columns besides the prompt
    do not, nor does whether it was given as text or as messages.
    """

    def turn(message: Message) -> tuple[str, ...]:
        words = " ".join(unicodedata.normalize("NFC", message.content).split())
        extra = [json.dumps(message.extra, sort_keys=True)] if message.extra else []
        return (message.role, words, *extra, *(image.digest for image in message.images))

    tools = [("tools", json.dumps(prompt.tools, sort_keys=True))] if prompt.tools else []
    return (*map(turn, prompt.messages), *tools)


def set_aside(
    prompts: Sequence[Prompt], order: Iterable[int], wanted: int, prefer: Callable[[Prompt], bool]
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and different prompts set aside: at most a fifth of the prompts and of the rows.

    All rows with the same prompt are set aside together, and one of them stands for them. In data without repeated
    prompts these are the first rows of the order.

    Args:
        prompts: The prompts in the order of the rows.
        order: Order in which the rows are tried.
        wanted: Largest number of prompts to set aside.
        prefer: Which of the rows with the same prompt stands for them, where not the first.

    Returns:
        Both in the order of the rows.
    """
    keys = [content(prompt) for prompt in prompts]
    rows = _grouped(keys)
    wanted, room = min(wanted, len(rows) // 5), len(prompts) // 5
    chosen: dict[Content, int] = {}
    for index in order:
        if len(chosen) >= wanted:
            break
        key = keys[index]
        if key not in chosen and len(rows[key]) <= room:
            room -= len(rows[key])
            chosen[key] = next((row for row in rows[key] if prefer(prompts[row])), rows[key][0])
    rest = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in chosen]
    return rest, [prompts[row] for row in sorted(chosen.values())]


def different(prompts: Sequence[Prompt]) -> int:
    """The number of different prompts."""
    return len({content(prompt) for prompt in prompts})


def repeats(prompts: Sequence[Prompt], whose: str) -> list[str]:
    """Sentences about rows that repeat a prompt, and about prompts with answers that differ; none without such rows.

    Args:
        prompts: The prompts in the order of the rows.
        whose: Their name in messages, such as "training rows".
    """
    rows = _grouped([content(prompt) for prompt in prompts])
    found: list[str] = []
    if len(rows) < len(prompts):
        again = min(group[1] for group in rows.values() if len(group) > 1)
        found.append(
            f"{len(prompts) - len(rows)} of {len(prompts)} {whose} repeat the prompt of an earlier one "
            f"('{prompts[again].id}' first), which leaves {counted(len(rows), 'different prompt')}"
        )
    torn = [group[0] for group in rows.values() if len(_answers(prompts[row] for row in group)) > 1]
    if torn:
        found.append(
            f"{len(torn)} prompts of the {whose} occur with different answers ('{prompts[torn[0]].id}' first): what is "
            "right by one row is wrong by another; make their answers agree"
        )
    return found


def overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    """A sentence about training rows whose prompt is also held out; none without such rows."""
    evaluated = {content(prompt) for prompt in held_out}
    both = [prompt for prompt in train if content(prompt) in evaluated]
    if not both:
        return []
    known = {content(prompt) for prompt in both}
    count = sum(content(prompt) in known for prompt in held_out)
    return [
        f"{count} of {len(held_out)} prompts to be evaluated on are also in {len(both)} training rows ('{both[0].id}' "
        "first): results on those say nothing of new problems; take them out of the training data or of eval.data"
    ]


def _grouped(keys: Sequence[Content]) -> dict[Content, list[int]]:
    rows: dict[Content, list[int]] = {}
    for index, key in enumerate(keys):
        rows.setdefault(key, []).append(index)
    return rows


def _answers(prompts: Iterable[Prompt]) -> set[str]:
    return {" ".join(prompt.answer.split()) for prompt in prompts if prompt.answer is not None}
