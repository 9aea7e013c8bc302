"""What follows a turn of the model's in its conversation, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from retort.align.chat import Reading, render
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["reply_ids"]

#: In the place of the model's turn: its own ids are kept as they were written, and never rendered again.
_TURN = Message("assistant", "Retortanswer")


def reply_ids(
    prompt: Prompt,
    said: Sequence[Message],
    stop: int,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
) -> list[int]:
    """The ids from the end of a turn of the model's to the beginning of its next one.

    They are what the chat template writes behind the turn's stop token when the conversation goes on: the rest of the
    turn's end, the messages, and what opens an answer. The turn itself stays as it was written, also where the template
    would leave its thinking out. A control token that a message spells is text, in the worst case with a blank in it.

    Args:
        prompt: How the conversation began.
        said: What is said to the model's turn.
        stop: The token that the turn ended with.
        tokenizer: Of the model.
        reading: What chat templates are told.

    Raises:
        UserError: There is no chat template, or it does not end turns with this token, writes what stood before the
            turn anew, or refuses or leaves out what is said.
    """
    who = f"prompt '{prompt.id}': the model cannot be answered"
    if reading.rendered or not tokenizer.chat_template:
        raise UserError(
            f"{who}, because its prompts are no conversations; an environment that replies needs a model with a chat "
            "template, and rollout.rendered=false"
        )
    whole_ids, other_ids = (
        render(replace(prompt, messages=(*prompt.messages, _TURN, first, *said[1:])), tokenizer, reading, split=True)
        for first in (said[0], replace(said[0], content=f"Retortagain {said[0].content}"))
    )
    if whole_ids == other_ids:
        raise UserError(f"{who}, because its chat template leaves out turns of the role '{said[0].role}'")
    before_ids = render(prompt, tokenizer, reading, split=True, opened=False)
    if whole_ids[: len(before_ids)] != before_ids:
        raise UserError(
            f"{who}, because its chat template writes earlier turns anew when another follows; use a model whose "
            "template only adds to a conversation"
        )
    # Both are the same up to what is said first; the turn's end is the last stop before that.
    places = enumerate(zip(whole_ids, other_ids, strict=False))
    behind = next((place for place, (one, two) in places if one != two), min(len(whole_ids), len(other_ids)))
    while behind > len(before_ids) and whole_ids[behind - 1] != stop:
        behind -= 1
    if behind == len(before_ids):
        raise UserError(
            f"{who}, because it ends its turns with {tokenizer.convert_ids_to_tokens(stop)!r}, which its chat template "
            "does not write there; set rollout.stop to the token that it writes after an assistant's turn"
        )
    return whole_ids[behind:]
