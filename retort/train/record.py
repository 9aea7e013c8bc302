"""The per-token record: a few rollouts of every step, with what was said about each of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retort.streams import permutation
from retort.train.setup import Setup
from retort.train.update import Batch

#: Names of the record's columns for the values they come from; others keep their names.
_COLUMNS = {"watch.student_entropy": "student_entropy", "watch.teacher_entropy": "teacher_entropy"}


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
    return [_row(setup, batch, values, step, index) for index in sorted(chosen)]


def _row(setup: Setup, batch: Batch, values: Mapping[str, Tensor], step: int, index: int) -> dict[str, Any]:
    rollout = batch.pack.rollouts[index]
    places_N = batch.pack.steps_of([index])
    tokenizer = setup.student.tokenizer
    return {
        "step": step,
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "text": rollout.text,
        "member": rollout.member,
        "source": rollout.source,
        "status": str(rollout.status),
        "reward": rollout.reward,
        "ids": rollout.action_ids,
        "tokens": [tokenizer.decode([token]) for token in rollout.action_ids],
        "columns": {
            _COLUMNS.get(name, name.removeprefix("watch.")): [_short(x) for x in values_N[places_N].tolist()]
            for name, values_N in values.items()
        },
    }


def _short(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
