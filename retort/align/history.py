"""A conversation that is rendered as a whole before a turn, and whether it has to be.

A growing conversation keeps the ids that a model wrote. Many chat templates write earlier turns otherwise once another
follows: they drop the thinking. The model would then never read the grown conversation where it is used, so it is
rendered anew, from texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from retort.align.chat import TemplateOptions, as_text, rendered
from retort.align.encode import spelt
from retort.align.images import ImageTokens
from retort.align.replies import cannot_reply, leaves_out
from retort.align.text import after_thinking
from retort.align.turns import conversation
from retort.core.rollouts import Message, Prompt
from retort.core.sequences import TokenSequence
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Exchange", "anew", "recent", "rewrites_earlier"]


@dataclass(frozen=True)
class Exchange:
    """A turn of the model, and the reply to it.

    Attributes:
        text: Text of the turn, see `retort.align.text.completion_text`.
        replies: The messages that reply.
    """

    text: str
    replies: tuple[Message, ...]


def recent(exchanges: Sequence[Exchange], count: int | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Message, ...]:
    """The messages of the last exchanges, in order.

    The last reply is always among them: it is what the model has to act on. Of a turn whose thinking stands between
    control tokens, which no message can spell, only what follows the thinking is shown.

    Args:
        exchanges: All exchanges so far, at least one.
        count: Number of exchanges; None for all.
        tokenizer: The tokenizer of whoever reads them.
    """
    if count == 0:
        return exchanges[-1].replies
    found: list[Message] = []
    for own in exchanges if count is None else exchanges[-count:]:
        text = after_thinking(own.text).strip() if spelt(own.text, tokenizer) else own.text
        found += [Message("assistant", text), *own.replies]
    return tuple(found)


def anew(
    prompt: Prompt,
    history: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions,
    image_tokens: ImageTokens | None = None,
) -> TokenSequence:
    """A prompt and the messages behind it as a model reads them, up to where its next turn begins.

    A control token that a message spells is text, if need be with a blank in it.

    Args:
        prompt: The prompt that began the conversation.
        history: The messages behind it, a reply to the model at their end.
        tokenizer: The model's tokenizer.
        template_options: Options of chat templates.
        image_tokens: How the model writes images; None for one of text alone.

    Raises:
        UserError: There is no chat template, or it refuses or leaves out a message.
    """
    cannot_reply(prompt, tokenizer, template_options)
    whole, last = prompt.then(history), history[-1]
    context = rendered(whole, tokenizer, template_options, image_tokens, split=True)
    other = prompt.then([*history[:-1], replace(last, content=f"Retortagain {last.content}")])
    if as_text(conversation(whole.messages), tokenizer, template_options, tools=prompt.tools) == as_text(
        conversation(other.messages), tokenizer, template_options, tools=prompt.tools
    ):
        raise UserError(leaves_out(prompt, last))
    return context


def rewrites_earlier(
    prompt: Prompt,
    exchanges: Sequence[Exchange],
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions,
) -> bool:
    """Whether a chat template would write a conversation otherwise than it stands, now that a reply follows.

    That is so where the prompt no longer stands at the beginning as it was, or where a turn of the model is not shown
    in full. Blanks around a turn, and the header before it, do not count. Of a template that refuses these turns as
    text nothing is known, and the answer is no.

    Args:
        prompt: The prompt as it was rendered.
        exchanges: The turns that were generated behind it, and the replies, at least one of each.
        tokenizer: The model's tokenizer.
        template_options: Options of chat templates.
    """
    messages = [message for own in exchanges for message in (Message("assistant", own.text), *own.replies)]
    try:
        begun, whole = (
            as_text(conversation(own.messages), tokenizer, template_options, opened=opened, tools=prompt.tools)
            for own, opened in ((prompt, False), (prompt.then(messages), True))
        )
    except Exception:  # jinja2's errors, and what the template itself raises: it takes no such turns as text
        return False
    place = len(begun)
    for own in exchanges:
        turn = own.text.strip()
        found = whole.find(turn, place)
        if found < 0:
            return True
        place = found + len(turn)
    return not whole.startswith(begun)
