"""Splits conversations into one prompt for each turn that the assistant takes, with the given turns before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from retort.core.rollouts import Message, Prompt
from retort.errors import UserError, counted, quoted

__all__ = ["each_turn"]

#: Turns before which nobody has asked for anything yet.
_SILENT = ("system", "developer")


def each_turn(prompts: Sequence[Prompt], notes: list[str] | None = None) -> list[Prompt]:
    """A prompt for each turn of the assistant: the given turns before it, and the given turn as the response.

    The steps of a conversation follow one another in its order. Their ids are that of the row, a colon and the number
    of the step, from 1; a row with a single step keeps its id. System turns, tools and the domain are those of the row.
    Its other columns (`answer`, `clean`, and what only a teacher may see, images among it) say something of its last
    step and stay with that. A turn that calls tools is no response in words, so its step has none. A turn of the
    assistant that nobody has asked for, at the beginning, is no step.

    Args:
        prompts: Prompts as `retort.data.load_prompts` reads them, whose messages end before the last turn.
        notes: List that receives sentences on what was split and what was left out.

    Returns:
        At least as many prompts; the same ones where no conversation has an earlier turn of the assistant.

    Raises:
        UserError: One turn of the assistant follows another.

    Example:
        >>> from retort.data import each_turn, prompts_from_rows
        >>> names = ("user", "assistant", "user", "assistant")
        >>> talk = [{"role": name, "content": f"{name} {place}"} for place, name in enumerate(names)]
        >>> steps = each_turn(prompts_from_rows([{"messages": talk, "id": "a"}]))
        >>> [(step.id, len(step.messages), step.response) for step in steps]
        [('a:1', 1, 'assistant 1'), ('a:2', 3, 'assistant 3')]
    """
    counts: Counter[str] = Counter()
    taken = {prompt.id for prompt in prompts}
    found = [step for prompt in prompts for step in _steps(prompt, taken, counts)]
    if notes is not None:
        rows = counted(len(prompts), "row")
        notes.append(f"each turn of the assistant is a step of its own: {rows}, {counted(len(found), 'step')}")
        notes += [f"{what}: {count} of {len(found)}" for what, count in counts.items()]
    return found


def _steps(prompt: Prompt, taken: set[str], counts: Counter[str]) -> Iterator[Prompt]:
    places = [place for place, turn in enumerate(prompt.messages) if turn.role == "assistant"]
    twice = next((place for place in places if place - 1 in places), None)
    if twice is not None:
        raise UserError(
            f"row '{prompt.id}': two turns of the assistant follow each other (the second is "
            f"{quoted(prompt.messages[twice].readable, 40)}), so it is not clear which step that is; join them, or set "
            "data_turns = last"
        )
    asked = [place for place in places if any(turn.role not in _SILENT for turn in prompt.messages[:place])]
    if len(asked) < len(places):
        counts["the assistant speaks before anybody asks, which is in the later steps, and none itself"] += 1
    if not asked:
        yield prompt
        return
    for number, place in enumerate(asked, 1):
        turn = prompt.messages[place]
        yield replace(
            prompt,
            id=_free(f"{prompt.id}:{number}", taken),
            messages=prompt.messages[:place],
            answer=None,
            response=_words(turn, counts),
            privileged={},
            clean=None,
            teacher_images=(),
        )
    yield replace(prompt, id=_free(f"{prompt.id}:{len(asked) + 1}", taken))


def _words(turn: Message, counts: Counter[str]) -> str | None:
    """A given turn as a response; None where it is none in words."""
    if turn.images:
        counts["the given turn holds an image, so there is no response in words"] += 1
        return None
    if "tool_calls" in turn.extra:
        counts["the given turn calls a tool, so there is no response in words"] += 1
        return None
    return turn.content if turn.content.strip() else None


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"step-{name}"
    taken.add(name)
    return name
