"""The record of one rollout, token by token, as a line of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retort.align.text import decode
from retort.core.passages import Passage
from retort.core.rollouts import Message, Outcome, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence


def token_row(pack: Pack, index: int, columns: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """The row of a rollout with the values of each of its tokens.

    Args:
        pack: The pack that holds the rollout.
        index: Its index in R.
        columns: Values by name, [N] each.
        tokenizer: Tokenizer of the model that generated it.

    Returns:
        JSON values. `policy_version` is the number of optimizer steps that the student had taken when it generated the
        rollout. Present only where there is something to say: `segments` of a completion that may have been generated
        in several batches, each the `policy_version` and the number of tokens; `images` and `teacher_images`, their
        digests; `between`, the tokens that are read between decisions (replies of an environment); `anew`, the prompts
        with which further sequences begin; `measures` and `outcomes` of an episode, the latter turn by turn; `turns`,
        the turn of each token, from 0; and `passages`, the texts that models wrote for the teachers. The messages of an
        outcome are what the model read before its next turn.
    """
    rollout, index_A = pack.rollouts[index], pack.steps_of([index])
    bare = rollout.prompt.plain and len(rollout.prompt.messages) == 1
    return {
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.readable,
        **({} if bare else {"messages": _said(rollout.prompt.messages)}),
        **_digests(rollout.prompt),
        "text": rollout.text,
        "member": rollout.member,
        "source": rollout.source,
        **({"policy_version": rollout.policy_version} if rollout.source == "student" else {}),
        **({"segments": [list(own) for own in rollout.segments]} if rollout.segments else {}),
        "status": str(rollout.status),
        "reward": rollout.reward,
        **({"measures": dict(rollout.measures)} if rollout.measures else {}),
        "ids": rollout.action_ids,
        "tokens": [decode(tokenizer, [token]) for token in rollout.action_ids],
        **({"between": between} if (between := _between(rollout, tokenizer)) else {}),
        **({"anew": anew} if (anew := _anew(rollout, tokenizer)) else {}),
        **({"turns": rollout.turn_A.tolist()} if rollout.turn_A is not None else {}),
        **({"outcomes": [_outcome(own) for own in rollout.outcomes]} if rollout.outcomes else {}),
        **({"passages": [_passage(own) for own in rollout.passages]} if rollout.passages else {}),
        "columns": {name: [_short(x) for x in values_N[index_A].tolist()] for name, values_N in columns.items()},
    }


def _digests(prompt: Prompt) -> dict[str, list[str]]:
    """Digests of a prompt's images, in order, and of those that only a teacher sees; each only if there are any."""
    found = {"images": prompt.images, "teacher_images": prompt.teacher_images}
    return {name: [image.digest for image in images] for name, images in found.items() if images}


def _between(rollout: Rollout, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens read after a sequence's first decision: the step that each run precedes, its ids and text."""
    found, step = list[dict[str, Any]](), 0
    for piece in (piece for sequence in rollout.sequences for piece in sequence.continuation.pieces()):
        if not piece.steps:
            found.append(_read(step, piece, tokenizer))
        step += piece.steps
    return found


def _anew(rollout: Rollout, tokenizer: Any) -> list[dict[str, Any]]:
    """What is read before the first decision of each sequence but the first, likewise."""
    found, step = list[dict[str, Any]](), 0
    for number, sequence in enumerate(rollout.sequences):
        if number:
            found.append(_read(step, sequence.prefix, tokenizer))
        step += sequence.steps
    return found


def _read(step: int, piece: TokenSequence, tokenizer: Any) -> dict[str, Any]:
    ids: list[int] = piece.tokens_L.tolist()
    return {"before": step, "ids": ids, "text": decode(tokenizer, ids)}


def _outcome(own: Outcome) -> dict[str, Any]:
    """What came of a turn: what the environment replied, the turn's reward, and its measures that are not 0."""
    measures = {name: value for name, value in own.measures.items() if value}
    return {"messages": _said(own.messages), "reward": own.reward, **({"measures": measures} if measures else {})}


def _passage(own: Passage) -> dict[str, Any]:
    """A text that was written for the teachers: what it is, its author, and what else is known."""
    about = {"confidence": own.confidence, "step": own.sequence, "cut": None if own.completed else True}
    known = {name: value for name, value in about.items() if value is not None}
    return {"of": own.of, "model": own.model, "round": own.round, "text": own.text, **known}


def _said(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.readable] for message in messages]


def _short(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
