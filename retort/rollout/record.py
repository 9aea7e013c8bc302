"""The record of one rollout, token by token, as a line of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retort.align.text import decode
from retort.core.rollouts import Pack, Rollout


def token_row(pack: Pack, index: int, columns: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """The row of a rollout with the values of each of its tokens.

    Args:
        pack: The pack that holds the rollout.
        index: Its index in R.
        columns: Values by name, [N] each.
        tokenizer: Tokenizer of the model that generated it.

    Returns:
        JSON values. `between` is present only where tokens are read between decisions: replies of an environment.
    """
    rollout, index_A = pack.rollouts[index], pack.steps_of([index])
    return {
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        **({} if rollout.prompt.plain else {"messages": [[m.role, m.content] for m in rollout.prompt.messages]}),
        "text": rollout.text,
        "member": rollout.member,
        "source": rollout.source,
        "status": str(rollout.status),
        "reward": rollout.reward,
        "ids": rollout.action_ids,
        "tokens": [decode(tokenizer, [token]) for token in rollout.action_ids],
        **({"between": between} if (between := _between(rollout, tokenizer)) else {}),
        "columns": {name: [_short(x) for x in values_N[index_A].tolist()] for name, values_N in columns.items()},
    }


def _between(rollout: Rollout, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokens read after the first decision: the step that each run precedes, its ids and text."""
    found, step = list[dict[str, Any]](), 0
    for piece in rollout.sequence.continuation.pieces():
        if not piece.steps:
            ids: list[int] = piece.tokens_L.tolist()
            found.append({"before": step, "ids": ids, "text": decode(tokenizer, ids)})
        step += piece.steps
    return found


def _short(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
