"""One rollout, token by token, as a line of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retort.align.text import decode
from retort.types import Pack


def token_row(pack: Pack, index: int, columns: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """A rollout with what was said about each of its tokens.

    Args:
        pack: Holds the rollout.
        index: Its place in R.
        columns: Values by name, by place in N.
        tokenizer: Of whoever wrote it.
    """
    rollout, places_N = pack.rollouts[index], pack.steps_of([index])
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
        "columns": {name: [_short(x) for x in values_N[places_N].tolist()] for name, values_N in columns.items()},
    }


def _short(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
