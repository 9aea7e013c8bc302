"""The text that a chat template writes around messages, found by rendering test conversations with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retort.align.chat import TemplateOptions, as_text
from retort.align.encode import spelt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Turns", "looks_rendered", "of_another_family", "thinks", "turns", "unlike_a_turn"]

_QUESTION, _REPLY, _FOLLOW_UP = "Retortquestion", "Retortanswer", "Retortagain"
#: Beginnings of a user's turn in model families that many models follow.
_KNOWN = (
    "<|im_start|>user",
    "<|start_header_id|>user<|end_header_id|>",
    "<start_of_turn>user",
    "<|turn>user",
    "[INST]",
    "<\uff5cUser\uff5c>",
    "<|user|>",
)


@dataclass(frozen=True)
class Turns:
    """The text that a template writes around messages.

    Attributes:
        asked: The whole prompt for one question, with the header of the response.
        user: Text before a question that is not the first; empty where that is not known.
        answer: Text between a question and the response to it: the end of the one turn and the header of the other.
        end: Text after a question that nothing follows.
        opened: Text after a question that a response is to follow; None where the prompt does not hold the question.
    """

    asked: str
    user: str
    answer: str
    end: str
    opened: str | None

    @property
    def header(self) -> str:
        """The header of a response."""
        return self._without_end(self.answer)

    @property
    def beginning(self) -> str:
        """The text at the end of a prompt in the header's position."""
        return self._without_end(self.opened or "")

    def _without_end(self, text: str) -> str:
        return text[len(_shared(self.end, self.answer)) :].strip()


def turns(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions) -> Turns | None:
    """The text around messages; None without a chat template, or where it refuses a question and a response.

    Args:
        tokenizer: Tokenizer of the model.
        template_options: Options of the template.
    """
    if not tokenizer.chat_template or template_options.rendered:
        return None
    try:
        asked = _rendered(tokenizer, template_options, _QUESTION, opened=True)
        end = _after(_QUESTION, _rendered(tokenizer, template_options, _QUESTION)) or ""
        conversation = _rendered(tokenizer, template_options, _QUESTION, _REPLY)
    except Exception:  # jinja2's errors, and errors of the template itself; rendering a prompt reports them
        return None
    return Turns(
        asked=asked,
        user=_user(tokenizer, template_options, _after(_REPLY, conversation) or ""),
        answer=_between(_QUESTION, _REPLY, conversation),
        end=end,
        opened=_after(_QUESTION, asked),
    )


def unlike_a_turn(template: Turns) -> tuple[str, bool] | None:
    """The fault at the end of a prompt, judged by the template's own conversations; None if there is none.

    The prompt has to show the question, and to end with the header that the template writes before a response. That may
    be empty (Mistral's families end the user's turn and are there), and the prompt may go on after it (`<think>`).

    Returns:
        The fault, and whether the prompt is unusable, because the model would have to begin its turn itself.
    """
    if template.opened is None:
        return "it does not show the user's message", True
    header, beginning = template.header, template.beginning
    if not header or _shared(header, beginning):
        return None
    if template.opened.strip() == template.end.strip():
        return f"it ignores add_generation_prompt: the {header!r} that it writes before responses is missing", True
    return f"it ends a prompt with {beginning!r}, but writes {header!r} before responses", False


def thinks(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions) -> str | None:
    """The use of a template that knows `enable_thinking`: on, off, or its own; None if it does not know it."""
    if not tokenizer.chat_template or template_options.rendered:
        return None
    try:
        on, off, now = (
            _rendered(tokenizer, TemplateOptions(thinking, template_options.date), _QUESTION, opened=True)
            for thinking in (True, False, template_options.thinking)
        )
    except Exception:  # as above
        return None
    if on == off:
        return None if now == on else "its own"
    return {on: "on", off: "off"}.get(now, "its own")


def looks_rendered(text: str, tokenizer: PreTrainedTokenizerBase, template: Turns | None) -> str | None:
    """The beginning of a user's turn in a text that is a rendered prompt, or None.

    The text is one if it begins with a control token of this tokenizer and holds, in such tokens, the text that its
    chat template (or that of a common family) writes before a question, and another control token for that turn's end.

    Args:
        text: Text of a message.
        tokenizer: Tokenizer of the model that reads it.
        template: The result of `turns` for it.
    """
    names = spelt(text, tokenizer)
    if not names or not text.lstrip().startswith(names[0]) or len({*names} - {str(tokenizer.bos_token)}) < 2:
        return None
    own = template.user.strip() if template is not None else ""
    known = [*([own] if own else []), *_KNOWN]
    return next((begins for begins in known if begins in text and spelt(begins, tokenizer)), None)


def of_another_family(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The beginning of a user's turn at a text's beginning, in control tokens that this tokenizer does not have."""
    begins = re.match(r"\s*[<\[]", text)
    return next((known for known in _KNOWN if begins and known in text and not spelt(known, tokenizer)), None)


def _user(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, end: str) -> str:
    try:
        again = _between(_REPLY, _FOLLOW_UP, _rendered(tokenizer, template_options, _QUESTION, _REPLY, _FOLLOW_UP))
    except Exception:  # as above
        return ""
    return again[len(_shared(end, again)) :]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, *contents: str, opened: bool = False
) -> str:
    roles: Sequence[str] = ("user", "assistant", "user")
    talk: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return as_text(talk, tokenizer, template_options, opened=opened)


def _shared(one: str, other: str) -> str:
    """The common beginning of two texts, without a part of a token such as `<|user|>`."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    common = one[: next(differing, min(len(one), len(other)))]
    for opens, closes in ("<>", "[]"):
        if common.rfind(opens) > common.rfind(closes):
            common = common[: common.rfind(opens)]
    return common


def _after(name: str, text: str) -> str | None:
    _, found, rest = text.rpartition(name)
    return rest if found else None


def _between(first: str, second: str, text: str) -> str:
    rest = text.rpartition(second)[0]
    return _after(first, rest) or ""
