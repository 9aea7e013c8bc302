"""The data's response to a prompt as a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retort.align.encode import Spelt, response_ids
from retort.align.stops import StopTokens
from retort.core.rollouts import Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def closed_ids(
    prompt: Prompt, context: TokenSequence, tokenizer: PreTrainedTokenizerBase, stops: StopTokens, vocab: int
) -> list[int]:
    """The ids of the data's response to a prompt, closed with the student's stop token.

    Args:
        prompt: A prompt with a response.
        context: What the student reads before it.
        tokenizer: The student's.
        stops: Where the student's completions end.
        vocab: Number of ids that student and teachers share.

    Raises:
        UserError: The response spells a control token of the student, or holds an id that not all models have.
    """
    assert prompt.response is not None  # checked by `prepare`
    try:
        ids = response_ids(context.ids, prompt.response, tokenizer)
    except Spelt as error:
        raise UserError(
            f"row '{prompt.id}': its response spells the control token {error.token!r}, which the student's "
            "tokenizer cannot encode as ordinary text; take it out of the response, or drop the row"
        ) from None
    outside = [token for token in ids if token >= vocab]
    if outside:
        raise UserError(
            f"row '{prompt.id}': its response holds token id {outside[0]}, which student and teacher do not share"
        )
    return [*ids, stops.primary]


def response_rollout(prompt: Prompt, epoch: int, longest: int, context: TokenSequence, ids: list[int]) -> Rollout:
    """The rollout of closed ids behind a context, cut to a length.

    Args:
        prompt: The prompt.
        epoch: How many times the run had been through the data.
        longest: Most tokens.
        context: What the student reads before them.
        ids: As `closed_ids` returns them.
    """
    return Rollout(
        prompt=prompt,
        sequences=(context.then(ids[:longest], decided=True),),
        status=Status.COMPLETED if len(ids) <= longest else Status.TRUNCATED,
        visit=epoch,
        source="dataset",
        text=prompt.response or "",
    )
