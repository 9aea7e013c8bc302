"""What the metrics of a step say of its batch besides the means of the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from retort.train.learning.diagnose import against_rewards
from retort.train.learning.passes import Batch
from retort.train.output import record
from retort.train.output.base import RolloutSource
from retort.train.output.units import unit_metrics


def batch_metrics(
    batch: Batch, values: Mapping[str, Tensor], version: int, source: RolloutSource, given_up: int
) -> dict[str, float]:
    """Numbers of a batch by their names in `metrics.jsonl`.

    Args:
        batch: The batch.
        values: What was computed of each of its generated tokens, [N] each.
        version: Number of optimizer steps behind the student that wrote it.
        source: Where it comes from.
        given_up: Number of completions of it that a teacher did not end.
    """
    curriculum = batch.method.rollout.curriculum
    return {
        **record.rollout_metrics(batch, version),
        **against_rewards(batch.pack, values, batch.valid.get("teacher")),
        **unit_metrics(batch, values),
        **({"given_up": given_up} if given_up else {}),
        **({"episode_errors": len(source.failed)} if source.failed else {}),
        **source.unended.metrics(),
        **({"horizon": curriculum.horizon(batch.clock.done)} if curriculum else {}),
    }
