"""Who is judged when in a run, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retort.evaluate.evaluator import Evaluator
from retort.ranks import here
from retort.teachers.local import LocalTeacher
from retort.train.models.models import engine
from retort.train.output import results
from retort.train.setup.prepare import Prepared

#: Takes prompts done and prompts in all.
Progress = Callable[[int, int], None]


class Evaluations:
    """The judge of a run and what it has said so far. Without held-out prompts nobody is judged."""

    def __init__(self, prepared: Prepared, folder: Path, check: Callable[[], None]) -> None:
        """Reads the table of a run that is resumed; `check` is called before anything is written.

        Raises:
            UserError: The table is damaged.
        """
        self._prepared, self._folder, self._check = prepared, folder, check
        held_out = prepared.held_out
        config, vocab = prepared.config, prepared.learner.vocab
        self._evaluator = Evaluator.of(config, held_out, prepared.eval_grader, vocab=vocab) if held_out else None
        self.results = results.read(folder, self._evaluator, prepared.config)

    def __bool__(self) -> bool:
        """Whether anybody is judged."""
        return self._evaluator is not None

    @property
    def has_begun(self) -> bool:
        """Whether the student was judged before it learnt."""
        return results.has(self.results, results.BEFORE)

    def due(self, step: int) -> bool:
        """Whether the student is judged after a step."""
        every = self._prepared.config.eval.every
        return bool(self) and every > 0 and step % every == 0

    def teacher(self, progress: Progress) -> None:
        """Judges the teacher, where there is one and the settings ask for it."""
        lm, asked = self._prepared.teachers.lms.get("teacher"), self._asked()
        if self._prepared.config.eval.teacher and lm is not None:
            own = asked.in_its_own_words() if isinstance(asked, LocalTeacher) else asked
            self._add(results.TEACHER, self._judged(lm, own, progress))

    def student(self, progress: Progress, who: str | None = None) -> dict[str, float]:
        """Judges the student as it is now.

        Args:
            progress: Called as it goes on.
            who: Its row of the table, if it is to have one.

        Returns:
            The means by name.
        """
        row = self._judged(self._prepared.student, self._asked(), progress)
        if who is not None:
            self._add(who, row)
        return results.scores(row)

    def goodness(self, scores: dict[str, float]) -> float | None:
        """What the best checkpoint has most of: avg@k, or where nothing can be graded, closeness to the teacher.

        None where there is neither: a self-teacher has nothing to say of the student's own prompt.
        """
        assert self._evaluator is not None
        if f"avg@{self._evaluator.samples}" in scores:
            return scores[f"avg@{self._evaluator.samples}"]
        return -scores["reverse_kl"] if "reverse_kl" in scores else None

    def _judged(self, lm: Any, teacher: Any, progress: Progress) -> dict[str, Any]:
        assert self._evaluator is not None
        writer = engine(self._prepared.config, lm, self._evaluator.vocab)
        with lm.whole():
            return self._evaluator.evaluate(lm, writer, teacher=teacher, progress=progress)

    def _add(self, who: str, row: dict[str, Any]) -> None:
        def added() -> dict[str, Any]:
            self._check()
            return results.add(self._folder, self.results, who, row)

        self.results = here().first(added)

    def _asked(self) -> Any:
        """The teacher, where some view of the method is of it: whom answers are compared with."""
        asks = any(view.model == "teacher" for view in self._prepared.method.views.values())
        return self._prepared.teachers.models["teacher"] if asks else None
