"""From a prompt to the ids that a model continues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from retort.align.encode import Spelt, filled, ordinary, spelt, split_open
from retort.align.turns import changed, conversation, inner_texts, unshown, with_inner
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Reading", "Renderer", "dated", "render", "written"]

#: Ids that a renderer keeps: some 40 MB of numbers in Python.
_KEPT = 2**20
#: How a template asks for the time: a function that transformers gives to it, and a format.
_NOW = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")


@dataclass(frozen=True)
class Reading:
    """How prompts become ids.

    As it stands, ids are those of the tokenizer's own `apply_chat_template(..., add_generation_prompt=True)`.

    Attributes:
        thinking: Passed to chat templates as `enable_thinking`; None: not passed, each does what it does by itself.
        date: Day for templates that write today's, as 2026-11-29; None: today.
        rendered: Prompts are rendered already: no template is applied, and control tokens that they spell count.
    """

    thinking: bool | None = None
    date: str | None = None
    rendered: bool = False


_AS_WRITTEN = Reading()


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading = _AS_WRITTEN,
    *,
    split: bool = False,
    opened: bool = True,
) -> list[int]:
    """The ids of a prompt, up to where the model's own writing begins.

    With a chat template: the conversation, and the beginning of the assistant's turn. Without one, a plain prompt is
    the bare text with the special tokens that this tokenizer puts before a text, but without an end-of-text token
    after it: after that, a model would begin a new document.

    A control token that a message spells is text: only the template, or the tokenizer itself, writes control tokens.
    Prompts that are `rendered` already are the exception, and begin with one beginning-of-text token where the
    tokenizer writes one, whether or not they spell it.

    Args:
        prompt: What to render; nothing but its messages is shown.
        tokenizer: Of the model that continues.
        reading: What templates are told.
        split: Put a blank into a spelt control token that the tokenizer cannot encode as text, instead of refusing it.
        opened: See `written`; bare texts have no such beginning.

    Returns:
        At least one id.

    Raises:
        UserError: Messages without a chat template or where prompts are rendered already, a conversation that the
            template refuses, nothing to encode, or a control token that cannot be text.
    """
    try:
        return _ids(prompt, tokenizer, reading, opened)
    except Spelt as error:
        if split:
            return _ids(changed(prompt, lambda text: split_open(text, tokenizer)), tokenizer, reading, opened)
        raise UserError(
            f"row '{prompt.id}': its prompt spells the control token {error.token!r}, which the "
            f"tokenizer{_named(tokenizer)} cannot encode as ordinary text; take it out of the prompt, or drop the row"
        ) from None


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, reading: Reading, opened: bool) -> list[int]:
    if reading.rendered:
        ids = _as_it_stands(prompt, tokenizer)
    elif tokenizer.chat_template:
        ids = _templated(prompt, tokenizer, reading, opened)
    elif prompt.plain:
        ids = _bare(prompt, tokenizer)
    else:
        raise UserError(
            f"prompt '{prompt.id}' is a conversation, but the tokenizer{_named(tokenizer)} has no chat template; "
            "give it one (chat_template.jinja in its folder), or use a plain column 'prompt' without system and tools"
        )
    if not ids:
        raise UserError(f"prompt '{prompt.id}' encodes to no tokens with the tokenizer{_named(tokenizer)}")
    return ids


class Renderer:
    """`render` with one tokenizer, which does not render again what it rendered before.

    A run comes back to every prompt in each epoch. What is kept is bounded: what does not fit is rendered every time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading = _AS_WRITTEN) -> None:
        """Nothing rendered yet.

        Args:
            tokenizer: Of the model that continues.
            reading: See `render`.
        """
        self.tokenizer = tokenizer
        self.reading = reading
        self._found: dict[tuple[tuple[Message, ...], str, bool, bool], list[int]] = {}
        self._kept = 0

    def __call__(self, prompt: Prompt, *, split: bool = False) -> list[int]:
        """The ids of a prompt; not to be changed.

        Args:
            prompt: What to render.
            split: See `render`; for texts that models wrote, which must not end a run.

        Raises:
            UserError: See `render`.
        """
        key = (prompt.messages, json.dumps(prompt.tools), prompt.plain, split)
        ids = self._found.get(key)
        if ids is None:
            ids = render(prompt, self.tokenizer, self.reading, split=split)
            if self._kept + len(ids) <= _KEPT:
                self._found[key] = ids
                self._kept += len(ids)
        return ids


def written(
    turns: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading = _AS_WRITTEN,
    *,
    opened: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text that a chat template makes of a conversation. Whatever the template raises is passed on.

    Args:
        turns: See `conversation`.
        tokenizer: With a chat template.
        reading: What the template is told.
        opened: Ask for the beginning of the assistant's turn after it.
        tools: The functions that the model may call.
    """
    told: dict[str, Any] = {} if reading.thinking is None else {"enable_thinking": reading.thinking}
    if tools:
        told["tools"] = [dict(tool) for tool in tools]
    if reading.date is not None and dated(tokenizer):
        # Some have a template of its own for conversations with tools.
        told["chat_template"] = _on_day(tokenizer.get_chat_template(tools=told.get("tools")), reading.date)
    # As text: the ids come as a list or as a BatchEncoding, depending on the version of transformers.
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=opened, **told
    )
    return str(text)


def dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the day on which it is rendered."""
    found: Any = tokenizer.chat_template or ""
    return any(_NOW.search(str(text)) for text in (found.values() if isinstance(found, Mapping) else [found]))


@lru_cache(maxsize=16)
def _on_day(template: str, date: str) -> str:
    """A template in which every question for the time is answered: midnight of that day."""
    day = datetime.fromisoformat(date)

    def said(asked: re.Match[str]) -> str:
        return repr(day.strftime(asked[1][1:-1]))

    return _NOW.sub(said, template)


def _as_it_stands(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not prompt.plain:
        raise UserError(
            f"prompt '{prompt.id}' is a conversation, which is not rendered yet; rollout.rendered is for texts in a "
            "column 'prompt'"
        )
    ids = _bare(prompt, tokenizer, control=True)
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def _templated(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, reading: Reading, opened: bool) -> list[int]:
    # Other texts than contents steer templates (a call's type is compared), so that they are left as they are unless
    # they spell a control token.
    contents = [message.content for message in prompt.messages]
    spelling = [text for text in inner_texts(prompt) if spelt(text, tokenizer)]

    def shown(prompt: Prompt) -> str:
        return written(conversation(prompt.messages), tokenizer, reading, opened=opened, tools=prompt.tools)

    def template(texts: Sequence[str]) -> str:
        inner = dict(zip(spelling, texts[len(contents) :], strict=True))
        other = with_inner(prompt, lambda text: inner.get(text, text)) if inner else prompt
        turns = conversation(other.messages, texts[: len(contents)])
        return written(turns, tokenizer, reading, opened=opened, tools=other.tools)

    try:
        # The template writes its own special tokens, a beginning-of-text among them.
        ids = filled([*contents, *spelling], template, tokenizer)
        if not prompt.tools and all(turn.role in ("user", "assistant") and not turn.extra for turn in prompt.messages):
            return ids
        missing = unshown(prompt, shown(prompt), shown)
    except Spelt:
        raise
    except Exception as error:  # jinja2's errors, and what the template itself raises ("system role not supported")
        raise UserError(f"prompt '{prompt.id}': {_why('chat template', tokenizer, error)}") from error
    if missing:
        raise UserError(
            f"prompt '{prompt.id}': the chat template{_named(tokenizer)} leaves out {missing} without a word; use a "
            "model whose template shows them, or take them out of the data"
        )
    return ids


def _bare(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, control: bool = False) -> list[int]:
    try:
        text_only = not control and bool(spelt(prompt.text, tokenizer))
        bare = tokenizer.encode(prompt.text, add_special_tokens=False) if control else ordinary(prompt.text, tokenizer)
        ids = list(tokenizer.encode(prompt.text, add_special_tokens=True, split_special_tokens=text_only))
    except Spelt:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"prompt '{prompt.id}': {_why('tokenizer', tokenizer, error)}") from error
    eos = tokenizer.eos_token_id
    # One that the text itself ends with is the text's own business.
    added = _trailing(ids, eos) - _trailing(bare, eos)
    return ids[: len(ids) - added] if added > 0 else ids


def _trailing(ids: list[int], eos: object) -> int:
    count = 0
    while count < len(ids) and ids[-1 - count] == eos:
        count += 1
    return count


def _why(part: str, tokenizer: PreTrainedTokenizerBase, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the {part}{_named(tokenizer)} refuses it: {first}"


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
