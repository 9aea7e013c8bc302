"""Conversations in the formats of data sets: OpenAI's messages, ShareGPT's turns, parts, tool calls, JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from retort.core.images import PromptImage
from retort.core.rollouts import Message
from retort.data.image_parts import IMAGE_PARTS, RowImages, with_images
from retort.data.media import check_media
from retort.data.values import decode, json_value, parsed, strict_json, text
from retort.errors import UserError, a_kind, did_you_mean, quoted

__all__ = ["LAST_ROLES", "ROLES", "as_conversation", "conversation", "read_tools"]

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")

#: Names of roles in other formats.
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
#: Names of a turn's role and of its content: OpenAI's, ShareGPT's.
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_TEXT_PARTS = ("text", "input_text", "output_text")
_PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:")


def as_conversation(where: str, prompt: str) -> list[Any] | None:
    """The turns that a text spells as JSON, or None where the text itself is the prompt.

    Raises:
        UserError: It spells turns in Python's notation, which is never meant as a prompt.
    """
    start = prompt.lstrip()[:1]
    if start != "[":
        return None
    if _PYTHON_TURNS.match(prompt):
        raise UserError(f"{where}: the prompt is a list of turns in Python's notation; write it with json.dumps")
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    turns = isinstance(found, list) and bool(found) and all(_is_turn(item) for item in cast("list[Any]", found))
    return parsed(where, "prompt", prompt) if turns else None


def _is_turn(item: Any) -> bool:
    return isinstance(item, Mapping) and any(
        isinstance(item.get(role), str) and (content in item or "tool_calls" in item)
        for role, content in zip(_ROLE, _CONTENT, strict=True)
    )


def conversation(where: str, value: Any, images: RowImages, name: str = "messages") -> tuple[Message, ...]:
    """The turns of a conversation, at least one; the caller checks who speaks last.

    Args:
        where: The row, for messages.
        value: A list of {role, content} or {from, value}, or JSON text of one.
        images: The images of the row, which parts without an image of their own take in order.
        name: The column, for messages.

    Raises:
        UserError: It is something else; a turn has an unknown role, or holds something besides text and images.
    """
    value = parsed(where, name, value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        kinds = "text or a list of {role, content}" if name == "prompt" else "a list of {role, content}"
        raise UserError(f"{where}: '{name}' is {a_kind(value)}; expected {kinds}{decode(value)}")
    if not value:
        raise UserError(f"{where}: '{name}' is empty; expected a list with at least one {{role, content}}")
    return tuple(_turn(f"{where}, message {index}", item, images) for index, item in enumerate(value))


def _turn(at: str, item: Any, images: RowImages) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{at}: is {a_kind(item)}; expected {{role, content}}")
    check_media(at, item)
    given = {str(key): value for key, value in item.items() if value is not None}
    spoken, content = _take(given, _ROLE), _take(given, _CONTENT)
    if spoken is None:
        raise UserError(f"{at}: has no 'role' (its keys: {', '.join(map(str, item)) or 'none'})")
    role = _ALIASES.get(spoken, spoken) if isinstance(spoken, str) else spoken
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{at}: unknown role {quoted(spoken)}; {did_you_mean(str(spoken), [*ROLES, *_ALIASES])}")
    calls = _calls(at, given.pop("tool_calls", None))
    if spoken == "function_call":
        calls += _named_calls(at, content)
        content = None
    if "function_call" in given:  # OpenAI's older form of a single call
        calls += _named_calls(at, given.pop("function_call"))
    extra = {**({"tool_calls": calls} if calls else {}), **given}
    found = Message(role, "", {key: json_value(at, key, value) for key, value in extra.items()})
    texts, own = _parts(at, content, images, silent=bool(calls))
    found = with_images(at, found, texts, own) if own else replace(found, content=texts[0])
    if role == "user" and not found.content.strip():
        raise UserError(f"{at}: the user's message is empty")
    return found


def _take(given: dict[str, Any], names: Sequence[str]) -> Any:
    return next((given.pop(name) for name in names if name in given), None)


def _parts(at: str, content: Any, images: RowImages, *, silent: bool) -> tuple[list[str], list[PromptImage]]:
    """The texts before, between and behind a turn's images, and these; a turn of tool calls may have no text.

    Neighbouring parts of text become lines of their own. Nothing is put between a text and an image.
    """
    if content is None and silent:
        return [""], []
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise UserError(f"{at}: content is {a_kind(content)}; expected text, or a list of parts{decode(content)}")
        return [text(at, "content", content)], []
    runs: list[list[str]] = [[]]
    found: list[PromptImage] = []
    for number, part in enumerate(cast("list[Any]", content)):
        own = _part(f"{at}, part {number}", part, images)
        if isinstance(own, str):
            runs[-1].append(own)
        else:
            found.append(own)
            runs.append([])
    return [text(at, "content", "\n".join(run)) for run in runs], found


def _part(at: str, part: Any, images: RowImages) -> str | PromptImage:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    words = part.get("text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(words, str):
        return words
    if kind in IMAGE_PARTS:
        return images.part(at, part)
    raise UserError(f"{at}: content holds a part of type {quoted(kind)}; parts of text and of images are read")


def _calls(at: str, value: Any) -> list[Any]:
    value = parsed(at, "tool_calls", value)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{at}: tool_calls is {a_kind(value)}; expected a list")
    return [_call(at, call) for call in value]


def _call(at: str, call: Any) -> dict[str, Any]:
    """A call whose arguments are an object, as chat templates expect them; JSON text is parsed."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{at}: a tool call is {quoted(call, 60)}; expected {{function: {{name, arguments}}}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            found = strict_json(arguments)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            function = {**function, "arguments": found}
    return {**call, "function": function} if "function" in call else dict(function)


def _named_calls(at: str, value: Any) -> list[Any]:
    """Calls written as {name, arguments}, or a list or JSON text of those."""
    value = parsed(at, "function_call", value)
    found = value if isinstance(value, list) else [value]
    return [_call(at, {"type": "function", "function": call}) for call in found]


def read_tools(where: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions that a model may call: a list of objects, or JSON text of the list or of each object.

    Raises:
        UserError: It is something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = parsed(where, "tools", value)
    if not isinstance(value, list):
        raise UserError(
            f"{where}: 'tools' is {a_kind(value)}; expected a list of the functions that the model may call "
            "(rename the column if it is something else)"
        )
    tools = [parsed(where, "tools", tool) for tool in value]
    for tool in tools:
        if not isinstance(tool, Mapping) or not tool:
            raise UserError(f"{where}: 'tools' holds {quoted(tool, 60)}; expected the JSON schema of a function")
    return tuple(json_value(where, "tools", tool) for tool in tools)
