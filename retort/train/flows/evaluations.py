"""The evaluations of a run whose student decides denoising steps, and their table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retort.core.rollouts import Prompt
from retort.evaluate.flows import FlowEvaluator, ModelOf
from retort.flows.model import FlowModel
from retort.teachers.routed import RoutedTeacher
from retort.train.flows.prepare import FlowPrepared
from retort.train.output import results
from retort.train.output.base import Progress


class FlowEvaluations:
    """See `retort.train.output.base.Evaluated`. Without held-out prompts nothing is evaluated."""

    def __init__(self, prepared: FlowPrepared, folder: Path, check: Callable[[], None]) -> None:
        """Reads the table of a run that is resumed; `check` is called before anything is written.

        Raises:
            UserError: The table is damaged.
        """
        self._prepared, self._folder, self._check = prepared, folder, check
        self._evaluator = evaluator_of(prepared) if prepared.held_out else None
        self.results: dict[str, Any] = results.read(folder, self._evaluator, prepared.config)

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
        """Evaluates each teacher on all prompts, and of several also each prompt's own one."""
        models, config = self._prepared.models, self._prepared.config
        if not config.eval.teacher:
            return
        together = self._prepared.teachers.models.get("teacher")
        if "teacher" in models:
            self._add(results.TEACHER, self._evaluate(models["teacher"], progress))
        elif isinstance(together, RoutedTeacher):
            route = together.route

            def own(prompt: Prompt) -> FlowModel:
                return models[route(prompt)]

            self._add(results.TEACHER, self._evaluate(own, progress))
        for name in config.teachers.models:
            self._add(results.of_teacher(name), self._evaluate(models[name], progress))

    def student(self, progress: Progress, who: str | None = None) -> dict[str, float]:
        """Evaluates the student as it is now.

        Args:
            progress: Called with prompts done and prompts in all.
            who: Label of its row in the table; None for no row.

        Returns:
            The means by name.
        """
        row = self._evaluate(self._prepared.student, progress)
        if who is not None:
            self._add(who, row)
        return results.scores(row)

    def goodness(self, scores: dict[str, float]) -> float | None:
        """The score of the best checkpoint: the mean reward, or where nothing is graded minus the reverse KL."""
        assert self._evaluator is not None
        graded = scores.get(f"avg@{self._evaluator.samples}")
        return graded if graded is not None else -scores["reverse_kl"] if "reverse_kl" in scores else None

    def _evaluate(self, model: FlowModel | ModelOf, progress: Progress) -> dict[str, Any]:
        assert self._evaluator is not None
        asked = any(view.model == "teacher" for view in self._prepared.method.views.values())
        teacher = self._prepared.teachers.models.get("teacher") if asked else None
        return self._evaluator.evaluate(model, teacher, progress)

    def _add(self, who: str, row: dict[str, Any]) -> None:
        self._check()
        self.results = results.add(self._folder, self.results, who, row)


def evaluator_of(prepared: FlowPrepared) -> FlowEvaluator:
    """The evaluator of a run's held-out prompts."""
    config = prepared.config
    return FlowEvaluator(
        prepared.held_out,
        prepared.grader,
        samples=config.eval.samples,
        steps=config.flow.eval_steps,
        seed=config.seed,
        batch=config.flow.batch,
        sampling=prepared.source.sampling,
    )
