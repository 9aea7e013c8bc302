"""The per-token record: a few rollouts of every step, with what was said about each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retort.rollout.record import token_row
from retort.streams import permutation
from retort.train.setup import Setup
from retort.train.update import Batch


def rows(setup: Setup, batch: Batch, values: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
    """Lines of `rollouts.jsonl` for one step; which rollouts is drawn by seed.

    Args:
        setup: Of the run.
        batch: The scored rollouts.
        values: Per-step values by place in N.
        step: Number of this step, from 1.
    """
    pack = batch.pack
    chosen = permutation(setup.config.seed, "record", step, count=len(pack.rollouts))[: setup.config.record.rollouts]
    columns = {name.removeprefix("watch."): values_N for name, values_N in values.items()}
    return [{"step": step, **token_row(pack, index, columns, setup.student.tokenizer)} for index in sorted(chosen)]
