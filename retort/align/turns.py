"""A prompt as chat templates read it: turns with all their fields, tools, and every text from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from retort.core.rollouts import Message, Prompt

__all__ = ["changed", "conversation", "inner_texts", "unshown", "with_inner"]

#: Roles whose turns some templates leave out.
_AT_RISK = ("tool", "system", "developer")


def conversation(messages: Sequence[Message], contents: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take.

    Args:
        messages: The turns.
        contents: Texts to use instead of their own contents, one for each.
    """
    if contents is None:
        return [message.as_dict() for message in messages]
    return [
        {**message.as_dict(), "content": message.parts(text)} for message, text in zip(messages, contents, strict=True)
    ]


def inner_texts(prompt: Prompt) -> list[str]:
    """The texts of a prompt besides its contents, each once: names and arguments of tools, keys among them."""
    return list(dict.fromkeys(_leaves([*(message.extra for message in prompt.messages), *prompt.tools])))


def _leaves(thing: Any) -> Iterator[str]:
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield str(key)
            yield from _leaves(value)
    elif isinstance(thing, Sequence):
        for item in thing:
            yield from _leaves(item)


def with_inner(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """The prompt with each of its inner texts changed by a function."""

    def put(thing: Any) -> Any:
        if isinstance(thing, str):
            return change(thing)
        if isinstance(thing, Mapping):
            return {change(str(key)): put(value) for key, value in thing.items()}
        return [put(item) for item in thing] if isinstance(thing, Sequence) else thing

    messages = tuple(replace(message, extra=put(message.extra)) for message in prompt.messages)
    return replace(prompt, messages=messages, tools=tuple(put(tool) for tool in prompt.tools))


def changed(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """The prompt with each of its texts changed by a function."""
    messages = tuple(replace(message, content=change(message.content)) for message in prompt.messages)
    return with_inner(replace(prompt, messages=messages), change)


def unshown(prompt: Prompt, text: str, template: Callable[[Prompt], str]) -> str | None:
    """The name of a part of a prompt that a chat template silently leaves out, for messages; None if it shows all.

    Each part is left out or replaced in turn: where the rendered text stays the same, the part was not read. Tools,
        tool calls, and turns of tools and of the system are checked.

    Args:
        prompt: The prompt.
        text: The text that the template makes of it.
        template: Renders another prompt. An error counts as having read the prompt.
    """
    messages = prompt.messages

    def same(other: Prompt) -> bool:
        try:
            return template(other) == text
        except Exception:  # jinja2's errors, and what the template itself raises
            return False

    if prompt.tools and same(replace(prompt, tools=())):
        return "tools"
    if any("tool_calls" in message.extra for message in messages):
        without = tuple(
            replace(m, extra={key: value for key, value in m.extra.items() if key != "tool_calls"}) for m in messages
        )
        if same(replace(prompt, messages=without)):
            return "tool calls"
    for index, message in enumerate(messages):
        words = message.content.strip()
        if message.role in _AT_RISK and words and words not in text:
            other = (*messages[:index], replace(message, content=f"{words} {words}"), *messages[index + 1 :])
            if same(replace(prompt, messages=other)):
                return f"turns of the role '{message.role}'"
    return None
