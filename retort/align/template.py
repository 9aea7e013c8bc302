"""What a chat template writes around messages, found by rendering conversations of our own with it."""

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

_ASKED, _SAID, _AGAIN = "Retortquestion", "Retortanswer", "Retortagain"
#: Beginnings of a user's turn in families that many models follow.
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
    """What a template writes around messages.

    Attributes:
        asked: The whole prompt for one question, with the beginning of the answer.
        user: Before a question that is not the first; empty where that is not known.
        answer: After a question and before the answer to it: what ends the one turn and begins the other.
        end: After a question that nothing follows.
        opened: After a question that is to be answered; None where the prompt does not hold the question.
    """

    asked: str
    user: str
    answer: str
    end: str
    opened: str | None

    @property
    def header(self) -> str:
        """What begins an answer."""
        return self._without_end(self.answer)

    @property
    def beginning(self) -> str:
        """What stands at the end of a prompt in its place."""
        return self._without_end(self.opened or "")

    def _without_end(self, text: str) -> str:
        return text[len(_shared(self.end, self.answer)) :].strip()


def turns(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions) -> Turns | None:
    """What the chat template writes around messages; None without one, or where it refuses a question and an answer.

    Args:
        tokenizer: Of the model.
        template_options: What the template is told.
    """
    if not tokenizer.chat_template or template_options.rendered:
        return None
    try:
        asked = _written(tokenizer, template_options, _ASKED, opened=True)
        end = _after(_ASKED, _written(tokenizer, template_options, _ASKED)) or ""
        said = _written(tokenizer, template_options, _ASKED, _SAID)
    except Exception:  # jinja2's errors, and what a template itself raises; rendering a prompt says so to the user
        return None
    return Turns(
        asked=asked,
        user=_user(tokenizer, template_options, _after(_SAID, said) or ""),
        answer=_between(_ASKED, _SAID, said),
        end=end,
        opened=_after(_ASKED, asked),
    )


def unlike_a_turn(found: Turns) -> tuple[str, bool] | None:
    """What is wrong with the end of a prompt, as the template's own conversations tell; None if nothing is.

    The prompt has to show the question, and to end with what the template writes before an answer. That may be nothing
    (Mistral's families end the user's turn and are there), and the prompt may go on after it (`<think>`).

    Returns:
        The fault, and whether the prompt is no prompt: the model would have to begin its turn itself.
    """
    if found.opened is None:
        return "it does not show the user's message", True
    header, beginning = found.header, found.beginning
    if not header or _shared(header, beginning):
        return None
    if found.opened.strip() == found.end.strip():
        return f"it ignores add_generation_prompt: the {header!r} that it writes before answers is missing", True
    return f"it ends a prompt with {beginning!r}, but writes {header!r} before answers", False


def thinks(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions) -> str | None:
    """Which way a template that knows `enable_thinking` is used: on, off, or its own; None if it does not know it."""
    if not tokenizer.chat_template or template_options.rendered:
        return None
    try:
        on, off, now = (
            _written(tokenizer, TemplateOptions(thinking, template_options.date), _ASKED, opened=True)
            for thinking in (True, False, template_options.thinking)
        )
    except Exception:  # as above
        return None
    if on == off:
        return None if now == on else "its own"
    return {on: "on", off: "off"}.get(now, "its own")


def looks_rendered(text: str, tokenizer: PreTrainedTokenizerBase, found: Turns | None) -> str | None:
    """The beginning of a user's turn in a text that is a rendered prompt, or None.

    It is one if it begins with a control token of this tokenizer and holds, in such tokens, what its chat template (or
    that of a family that many models follow) writes before a question, and another control token for that turn's end.

    Args:
        text: Of a message.
        tokenizer: Of the model that reads it.
        found: `turns` of it.
    """
    names = spelt(text, tokenizer)
    if not names or not text.lstrip().startswith(names[0]) or len({*names} - {str(tokenizer.bos_token)}) < 2:
        return None
    own = found.user.strip() if found is not None else ""
    known = [*([own] if own else []), *_KNOWN]
    return next((begins for begins in known if begins in text and spelt(begins, tokenizer)), None)


def of_another_family(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The beginning of a user's turn at a text's beginning, in control tokens that this tokenizer does not have."""
    begins = re.match(r"\s*[<\[]", text)
    return next((known for known in _KNOWN if begins and known in text and not spelt(known, tokenizer)), None)


def _user(tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, end: str) -> str:
    try:
        again = _between(_SAID, _AGAIN, _written(tokenizer, template_options, _ASKED, _SAID, _AGAIN))
    except Exception:  # as above
        return ""
    return again[len(_shared(end, again)) :]


def _written(
    tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, *contents: str, opened: bool = False
) -> str:
    roles: Sequence[str] = ("user", "assistant", "user")
    talk: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return as_text(talk, tokenizer, template_options, opened=opened)


def _shared(one: str, other: str) -> str:
    """The beginning that both have; no part of a token such as `<|user|>`."""
    places = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    found = one[: next(places, min(len(one), len(other)))]
    for opens, closes in ("<>", "[]"):
        if found.rfind(opens) > found.rfind(closes):
            found = found[: found.rfind(opens)]
    return found


def _after(name: str, text: str) -> str | None:
    _, found, rest = text.rpartition(name)
    return rest if found else None


def _between(first: str, second: str, text: str) -> str:
    rest = text.rpartition(second)[0]
    return _after(first, rest) or ""
