"""From a prompt to the ids that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from retort.align.encode import Spelt, filled, ordinary, spelt, split_open
from retort.errors import UserError
from retort.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "render"]

#: Ids that a renderer keeps: some 40 MB of numbers in Python.
_KEPT = 2**20


def render(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False, split: bool = False
) -> list[int]:
    """The ids of a prompt, up to where the model's own writing begins.

    With a chat template: the conversation, and the beginning of the assistant's turn. Without one, a plain prompt is
    the bare text with the special tokens that this tokenizer puts before a text, but without an end-of-text token
    after it: after that, a model would begin a new document.

    A control token that a message spells is text: only the template, or the tokenizer itself, writes control tokens.

    Args:
        prompt: What to render; nothing but its messages is shown.
        tokenizer: Of the model that continues.
        thinking: Passed to the template as `enable_thinking`; templates that do not know it ignore it.
        split: Put a blank into a spelt control token that the tokenizer cannot encode as text, instead of refusing it.

    Returns:
        At least one id.

    Raises:
        UserError: Messages without a chat template, a conversation that the template refuses, nothing to encode, or a
            control token that cannot be text.
    """
    try:
        return _rendered(prompt, tokenizer, thinking)
    except Spelt as error:
        if split:
            opened = tuple(replace(m, content=split_open(m.content, tokenizer)) for m in prompt.messages)
            return _rendered(replace(prompt, messages=opened), tokenizer, thinking)
        raise UserError(
            f"row '{prompt.id}': its prompt spells the control token {error.token!r}, which the "
            f"tokenizer{_named(tokenizer)} cannot encode as ordinary text; take it out of the prompt, or drop the row"
        ) from None


def _rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> list[int]:
    if tokenizer.chat_template:
        ids = _templated(prompt, tokenizer, thinking)
    elif prompt.plain:
        ids = _bare(prompt, tokenizer)
    else:
        raise UserError(
            f"prompt '{prompt.id}' is a conversation, but the tokenizer{_named(tokenizer)} has no chat template; "
            "give it one (chat_template.jinja in its folder), or use a plain column 'prompt'"
        )
    if not ids:
        raise UserError(f"prompt '{prompt.id}' encodes to no tokens with the tokenizer{_named(tokenizer)}")
    return ids


class Renderer:
    """`render` with one tokenizer, which does not render again what it rendered before.

    A run comes back to every prompt in each epoch. What is kept is bounded: what does not fit is rendered every time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        """Nothing rendered yet.

        Args:
            tokenizer: Of the model that continues.
            thinking: See `render`.
        """
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._found: dict[tuple[tuple[Message, ...], bool, bool], list[int]] = {}
        self._kept = 0

    def __call__(self, prompt: Prompt, *, split: bool = False) -> list[int]:
        """The ids of a prompt; not to be changed.

        Args:
            prompt: What to render.
            split: See `render`; for texts that models wrote, which must not end a run.

        Raises:
            UserError: See `render`.
        """
        key = (prompt.messages, prompt.plain, split)
        ids = self._found.get(key)
        if ids is None:
            ids = render(prompt, self.tokenizer, thinking=self.thinking, split=split)
            if self._kept + len(ids) <= _KEPT:
                self._found[key] = ids
                self._kept += len(ids)
        return ids


def _templated(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> list[int]:
    roles = [message.role for message in prompt.messages]

    def template(contents: Sequence[str]) -> str:
        # As text first: the ids come as a list or as a BatchEncoding, depending on the version of transformers.
        conversation = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        )

    try:
        # The template writes its own special tokens, a beginning-of-text among them.
        return filled([message.content for message in prompt.messages], template, tokenizer)
    except Spelt:
        raise
    except Exception as error:  # jinja2's errors, and what the template itself raises ("system role not supported")
        raise UserError(f"prompt '{prompt.id}': {_why('chat template', tokenizer, error)}") from error


def _bare(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        bare = ordinary(prompt.text, tokenizer)
        text_only = bool(spelt(prompt.text, tokenizer))
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
