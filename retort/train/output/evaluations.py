"""The evaluations of a run and their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from retort.evaluate.evaluator import Evaluator
from retort.evaluate.per_byte import PER_BYTE
from retort.models.stored import StoredModel
from retort.ranks import here
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher
from retort.train.models.models import engine
from retort.train.output import results, thumbnails
from retort.train.setup.prepare import Prepared

#: Called with prompts done and prompts in all.
Progress = Callable[[int, int], None]


class Evaluations:
    """The evaluator of a run and its table so far. Without held-out prompts nothing is evaluated."""

    def __init__(self, prepared: Prepared, folder: Path, check: Callable[[], None]) -> None:
        """Reads the table of a run that is resumed; `check` is called before anything is written.

        Raises:
            UserError: The table is damaged.
        """
        self._prepared, self._folder, self._check = prepared, folder, check
        held_out = prepared.held_out
        config, vocab = prepared.config, prepared.learner.vocab
        self._evaluator = (
            Evaluator.from_config(
                config, held_out, prepared.eval_grader, vocab=vocab, episodes=prepared.source.episodes
            )
            if held_out
            else None
        )
        self.results = results.read(folder, self._evaluator, prepared.config)

    def __bool__(self) -> bool:
        """Whether anything is evaluated."""
        return self._evaluator is not None

    @property
    def has_begun(self) -> bool:
        """Whether the student was evaluated before it learnt."""
        return results.has(self.results, results.BEFORE)

    def due(self, step: int) -> bool:
        """Whether the student is evaluated after a step."""
        every = self._prepared.config.eval.every
        return bool(self) and every > 0 and step % every == 0

    def teacher(self, progress: Progress) -> None:
        """Evaluates the teacher, where there is one and the settings ask for it."""
        lm, teacher = self._prepared.teachers.lms.get("teacher"), self._teacher()
        if self._prepared.config.eval.teacher and lm is not None and not isinstance(lm, StoredModel):
            own = teacher.in_own_ids() if isinstance(teacher, LocalTeacher) else teacher
            vocab = own.alignment.vocab if isinstance(own, LocalTeacher) else None
            # No student has the measures in the teacher's ids beside which its own would stand.
            compared = None if isinstance(teacher, SpanTeacher) else own
            self._add(results.TEACHER, self._evaluate(lm, compared, progress, vocab))

    def student(self, progress: Progress, who: str | None = None) -> dict[str, float]:
        """Evaluates the student as it is now.

        Args:
            progress: Called with prompts done and prompts in all.
            who: Label of its row in the table; None for no row.

        Returns:
            The means by name.
        """
        row = self._evaluate(self._prepared.student, self._teacher(), progress)
        if who is not None:
            self._add(who, row)
        return results.scores(row)

    def goodness(self, scores: dict[str, float]) -> float | None:
        """The score of the best checkpoint: avg@k, or where nothing can be graded, minus the reverse KL.

        That is per token, or per byte of a teacher with another tokenizer. None where there is neither: a self-teacher
        is not compared under the student's own prompt.
        """
        assert self._evaluator is not None
        if f"avg@{self._evaluator.samples}" in scores:
            return scores[f"avg@{self._evaluator.samples}"]
        return next((-scores[name] for name in ("reverse_kl", PER_BYTE) if name in scores), None)

    def _evaluate(self, lm: Any, teacher: Any, progress: Progress, vocab: int | None = None) -> dict[str, Any]:
        """A row of the table; `vocab`: the number of ids that are the model's tokens, if it is not the student's."""
        assert self._evaluator is not None
        evaluator = self._evaluator if vocab is None else replace(self._evaluator, vocab=vocab)
        generator = engine(self._prepared.config, lm, evaluator.vocab)
        with lm.whole():
            return evaluator.evaluate(lm, generator, teacher=teacher, progress=progress)

    def _add(self, who: str, row: dict[str, Any]) -> None:
        def added() -> dict[str, Any]:
            self._check()
            thumbnails.keep(self._folder, row.get("answers", ()), self._prepared.held_out)
            return results.add(self._folder, self.results, who, row)

        self.results = here().first(added)

    def _teacher(self) -> Any:
        """The teacher that completions are compared with, where some view of the method is of it."""
        needed = any(view.model == "teacher" for view in self._prepared.method.views.values())
        absent = any(isinstance(lm, StoredModel) for lm in self._prepared.teachers.lms.values())
        return self._prepared.teachers.models["teacher"] if needed and not absent else None
