"""Ids of the messages that follow a model's turn in its conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from retort.align.chat import TemplateOptions, render
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RewritesEarlierError", "cannot_reply", "leaves_out", "reply_ids"]

#: A placeholder for the model's turn: its own ids are kept as generated, and never rendered again.
_TURN = Message("assistant", "Retortanswer")


class RewritesEarlierError(UserError):
    """A chat template writes what stood before a turn otherwise once a reply follows."""


def reply_ids(
    prompt: Prompt,
    replies: Sequence[Message],
    stop: int,
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions,
) -> list[int]:
    """The ids from the end of a model's turn to the beginning of its next one.

    They are what the chat template writes behind the turn's stop token when the conversation goes on: the rest of the
    turn's end, the messages, and the header of the next turn. The turn itself stays as generated, also where the
    template would drop its thinking. A control token that a message spells is text, if need be with a blank in it.

    Args:
        prompt: The prompt that began the conversation.
        replies: The messages that reply to the model's turn.
        stop: Id of the token that ended the turn.
        tokenizer: The model's tokenizer.
        template_options: Options of chat templates.

    Raises:
        RewritesEarlierError: The chat template rewrites what stood before the turn.
        UserError: There is no chat template, or it does not end turns with this token, or refuses or leaves out a
            reply.
    """
    problem = cannot_reply(prompt, tokenizer, template_options)
    try:
        whole_ids, other_ids = _both(prompt, _TURN, replies, tokenizer, template_options)
    except UserError as refusal:  # some templates take the reply of a tool only behind a turn that called it
        if any(reply.role != "tool" for reply in replies):
            raise
        try:
            whole_ids, other_ids = _both(prompt, _calling(replies), replies, tokenizer, template_options)
        except UserError:
            raise refusal from None
    if whole_ids == other_ids:
        raise UserError(leaves_out(prompt, replies[0]))
    before_ids = render(prompt, tokenizer, template_options, split=True, opened=False)
    if whole_ids[: len(before_ids)] != before_ids:
        raise RewritesEarlierError(
            f"{problem}, because its chat template writes earlier turns anew when another follows; use a model whose "
            "template only adds to a conversation"
        )
    # Both are the same up to the first reply; the turn's end is the last stop before that.
    pairs = enumerate(zip(whole_ids, other_ids, strict=False))
    behind = next((index for index, (one, two) in pairs if one != two), min(len(whole_ids), len(other_ids)))
    while behind > len(before_ids) and whole_ids[behind - 1] != stop:
        behind -= 1
    if behind == len(before_ids):
        raise UserError(
            f"{problem}, because it ends its turns with {tokenizer.convert_ids_to_tokens(stop)!r}, which its chat "
            "template does not write there; set rollout.stop to the token that it writes after an assistant's turn"
        )
    return whole_ids[behind:]


def cannot_reply(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions) -> str:
    """The beginning of a message that an environment cannot reply in a conversation.

    Raises:
        UserError: There is no chat template.
    """
    problem = f"prompt '{prompt.id}': the environment cannot reply to the model"
    if template_options.rendered or not tokenizer.chat_template:
        raise UserError(
            f"{problem}, because its prompts are no conversations; an environment that replies needs a model with a "
            "chat template, and rollout.rendered=false"
        )
    return problem


def leaves_out(prompt: Prompt, reply: Message) -> str:
    """The message that a chat template leaves out a reply."""
    return (
        f"prompt '{prompt.id}': the environment cannot reply to the model, because its chat template leaves out turns "
        f"of the role '{reply.role}'"
    )


def _both(
    prompt: Prompt,
    turn: Message,
    replies: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions,
) -> tuple[list[int], list[int]]:
    """The ids of the conversation with a turn and its replies; and those with another first reply."""
    one, two = (
        render(
            replace(prompt, messages=(*prompt.messages, turn, first, *replies[1:])),
            tokenizer,
            template_options,
            split=True,
        )
        for first in (replies[0], replace(replies[0], content=f"Retortagain {replies[0].content}"))
    )
    return one, two


def _calling(replies: Sequence[Message]) -> Message:
    """A placeholder for a turn that calls the tools whose replies follow."""
    calls = [
        {
            "id": reply.extra.get("tool_call_id", ""),
            "type": "function",
            "function": {"name": reply.extra.get("name", ""), "arguments": {}},
        }
        for reply in replies
    ]
    return Message("assistant", "", {"tool_calls": calls})
