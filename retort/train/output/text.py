"""What runs leave behind whose student decides tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from retort.config import Config
from retort.core.signals import TeacherSignal
from retort.errors import UserError
from retort.ranks import here
from retort.train.learning.passes import Batch
from retort.train.output import export, record, saved, thumbnails
from retort.train.output.base import Output
from retort.train.output.batch_metrics import batch_metrics
from retort.train.output.evaluations import Evaluations
from retort.train.output.identity import identity
from retort.train.output.summary import summary
from retort.train.setup.prepare import Prepared
from retort.train.storage.checkpoint import Found


def token_parts(output: Output, who: str) -> Prepared:
    """The parts of a run whose student decides tokens.

    Args:
        output: The run's.
        who: Who reads them, for the message.

    Raises:
        UserError: The student of the run decides something else.
    """
    if not isinstance(output, TextOutput):
        raise UserError(f"{who} is about tokens, and the student of this run decides denoising steps")
    return output.prepared


@dataclass(frozen=True, eq=False)
class TextOutput:
    """See `retort.train.output.base.Output`.

    Attributes:
        prepared: The parts of the run.
        decides: See `Output`.
        example: See `Output`.
    """

    prepared: Prepared
    decides: str = "tokens"
    example: str = "(model, tokenizer)"

    def with_config(self, config: Config) -> TextOutput:
        """See `Output`."""
        return TextOutput(replace(self.prepared, config=config))

    def identity(self) -> dict[str, Any]:
        """See `Output`."""
        return identity(self.prepared)

    def state(self, best: tuple[float, int] | None, advised: Collection[str], identity: Mapping[str, Any]) -> Any:
        """See `Output`."""
        return saved.state_of(self.prepared, best, advised, identity)

    def refuse_other_run(
        self, path: Path, found: Found, identity: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        """See `Output`."""
        saved.refuse_other_run(path, found, self.prepared, identity, note)

    def summary(self) -> dict[str, str]:
        """See `Output`."""
        return summary(self.prepared)

    def evaluations(self, folder: Path, check: Callable[[], None]) -> Evaluations:
        """See `Output`."""
        return Evaluations(self.prepared, folder, check)

    def record(self, batch: Batch, values: Mapping[str, Tensor], step: int, folder: Path) -> list[dict[str, Any]]:
        """See `Output`."""
        prepared = self.prepared
        count, behind = prepared.config.record.rollouts, prepared.teachers.behind(batch.method)
        rows = record.rows(batch, values, step, count, prepared.student.tokenizer, behind)
        if here().leads:
            thumbnails.keep(folder, rows, [own.prompt for own in batch.pack.rollouts])
        return rows

    def metrics(
        self,
        batch: Batch,
        values: Mapping[str, Tensor],
        signals: Mapping[str, TeacherSignal],
        version: int,
        given_up: int,
    ) -> dict[str, float]:
        """See `Output`."""
        found = batch_metrics(batch, values, version, self.prepared.batches, given_up)
        return found | record.view_metrics(signals, batch.method.views, len(batch.pack.rollouts))

    def save_model(self, folder: Path, results: Mapping[str, Any], step: int, check: Callable[[], None]) -> None:
        """See `Output`."""
        export.write_model(self.prepared, folder, results, step, check)
