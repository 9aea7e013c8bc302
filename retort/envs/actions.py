"""What the environments of other packages share: the action in a turn, the tool that it may be called by, and rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from retort.align.calls import Call, calls_of
from retort.align.text import after_thinking

__all__ = ["MOST_ACTION", "action_of", "numbered", "numbered_rows", "tool"]

#: Characters of an action; a longer one is none.
MOST_ACTION = 200
_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL)


def action_of(text: str) -> str:
    """The action in a turn, in small letters with single blanks.

    It is what stands in the last `<action>`, or in a call of `act` as JSON (`{"name": "act", "arguments": {"action":
    ...}}`, with tags around it or not), or else everything behind the thinking.
    """
    said = after_thinking(text)
    tagged = _TAGGED.findall(said)
    return " ".join((tagged[-1] if tagged else _called(said)).lower().split())[: MOST_ACTION + 1]


def _called(text: str) -> str:
    calls = calls_of(text) or calls_of(text[max(0, text.find('{"')) :])
    call = calls[0] if calls else None
    action = call.arguments.get("action") if isinstance(call, Call) and call.name == "act" else None
    return action if isinstance(action, str) else text


def tool(description: str, actions: Sequence[str] = ()) -> dict[str, Any]:
    """The tool `act`, in the form of chat templates.

    Args:
        description: What it does.
        actions: All actions, where they can be listed.
    """
    action: dict[str, Any] = {"type": "string", **({"enum": list(actions)} if actions else {})}
    parameters = {"type": "object", "properties": {"action": action}, "required": ["action"]}
    return {"type": "function", "function": {"name": "act", "description": description, "parameters": parameters}}


def numbered_rows(kind: str, first: int) -> Iterator[dict[str, str]]:
    """Yields rows without end, each with a task such as `simple 17`: a kind, and the seed of the environment."""
    for number in count(first):
        yield {"id": f"{kind}-{number}", "prompt": f"{kind} {number}"}


def numbered(task: str, seed: int) -> tuple[str, int]:
    """The kind and the number of a task; the seed stands for a number that it lacks."""
    kind, _, number = task.strip().rpartition(" ")
    return (kind, int(number)) if kind and number.isascii() and number.isdigit() else (task.strip(), seed % (1 << 31))
