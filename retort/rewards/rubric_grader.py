"""The grader of groups by rubric: a model that talks draws criteria for each prompt, and decides which ones hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from retort.chat import Asker, Failure, Question
from retort.core import grading as measured
from retort.core.grading import RubricPlan
from retort.core.rollouts import Group, Prompt
from retort.errors import shortened, visible
from retort.rewards.base import Grade, Grader
from retort.rewards.references import References, seed_of
from retort.rewards.rubric import Rubric
from retort.rewards.rubric_protocol import (
    CATEGORIES,
    Pooled,
    graded_text,
    pool,
    rubric_question,
    verdicts_question,
)

__all__ = ["RubricGrader"]

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class _Case:
    """A group with all that is known of it so far.

    Attributes:
        group: The rollouts.
        teacher: The teacher's answers, each once.
        student: What is judged of the student's, in the order of the rollouts.
        rubric: The rubric, once there is one.
        verdicts: Whether each criterion holds, by source and number of an answer.
    """

    group: Group
    teacher: list[str]
    student: list[str]
    rubric: Rubric | None = None
    verdicts: Mapping[tuple[str, int], list[bool]] | None = None

    @property
    def uid(self) -> str:
        """What tells the group from all others of a run."""
        return f"{self.group[0].prompt.id}|{self.group[0].visit}"


class RubricGrader(Grader):
    """Grades each rollout by the share of a rubric's points that it earns (ROPD, arXiv 2605.07396).

    A group for which anything is missing (answers of the teacher, a rubric, a verdict on one answer) is not graded in
    part: all its rewards are 0, so that its advantages are, and `judge/fallback` counts it.
    """

    def __init__(
        self,
        asker: Asker,
        plan: RubricPlan,
        references: References,
        templates: Mapping[str, str],
        *,
        seed: int = 0,
        verifier: Grader | None = None,
    ) -> None:
        """Makes a grader.

        Args:
            asker: Asks rubricator and verifier.
            plan: What is asked.
            references: The teacher's answers.
            templates: The texts of all templates, by name (`retort.teachers.templates`).
            seed: The seed of the run.
            verifier: Grader of the task, whose grade is recorded beside (`reward/verified`) and never learnt from.
        """
        self._asker, self._plan, self._references, self._seed = asker, plan, references, seed
        self._templates, self._verifier = templates, verifier

    @property
    def name(self) -> str:
        """See `Grader`."""
        return "rubric"

    @property
    def references(self) -> References:
        """The teacher's answers."""
        return self._references

    @property
    def given_up(self) -> int:
        """As of the task's grader."""
        return 0 if self._verifier is None else self._verifier.given_up

    def can_grade(self, prompt: Prompt) -> bool:
        """See `Grader`: whether a judge can is not known before."""
        return True

    def start_batch(self) -> None:
        """See `Grader`."""
        if self._verifier is not None:
            self._verifier.start_batch()

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`."""
        return self.grade_all([group])[0]

    def grade_all(self, groups: Sequence[Group]) -> list[list[Grade | None]]:
        """Grades all groups of a batch, stage by stage, so that a judge has many questions at once.

        Raises:
            BudgetSpentError: The judge's budget is used up.
        """
        found = self._references.of([group[0].prompt for group in groups])
        cases: list[_Case | Failure] = [
            answers
            if isinstance(answers, Failure)
            else _Case(group, answers, [graded_text(rollout.text) for rollout in group])
            for group, answers in zip(groups, found, strict=True)
        ]
        cases = self._stage(cases, self._rubric_questions, _with_rubric)
        cases = self._stage(cases, self._verdict_questions, self._with_verdicts)
        verified = [[None] * len(group) for group in groups]
        if self._verifier is not None:
            verified = self._verifier.grade_all(groups)
        return [
            _failed(case, beside) if isinstance(case, Failure) else self._graded(case, beside)
            for case, beside in zip(cases, verified, strict=True)
        ]

    def _stage(
        self,
        cases: Sequence[_Case | Failure],
        questions: Callable[[_Case], list[Question[Out]]],
        put: Callable[[_Case, list[Out]], _Case],
    ) -> list[_Case | Failure]:
        """Asks the questions of all groups at once; one unusable answer and the whole group has failed."""
        asked = [[] if isinstance(case, Failure) else questions(case) for case in cases]
        answers = iter(self._asker.ask([question for own in asked for question in own]))
        after: list[_Case | Failure] = []
        for case, own in zip(cases, asked, strict=True):
            values, failed = list[Out](), None
            for answer in (next(answers) for _ in own):
                if isinstance(answer, Failure):
                    failed = failed or answer
                else:
                    values.append(answer)
            after.append(failed or (case if isinstance(case, Failure) else put(case, values)))
        return after

    def _rubric_questions(self, case: _Case) -> list[Question[Rubric]]:
        prompt, seed = case.group[0].prompt, seed_of(self._seed, "rubric", case.uid)
        return [rubric_question(prompt, case.teacher, case.student, self._plan, self._templates["rubric"], seed)]

    def _verdict_questions(self, case: _Case) -> list[Question[list[list[bool]]]]:
        assert case.rubric is not None  # it is asked for first
        prompt, template = case.group[0].prompt, self._templates["verdicts"]
        return [verdicts_question(prompt, case.rubric, own, self._plan, template) for own in self._calls(case)]

    def _calls(self, case: _Case) -> list[list[Pooled]]:
        """The answers of a group, blind and shuffled, as they are judged together."""
        answers = pool(case.uid, case.teacher, case.student)
        size = self._plan.per_call or len(answers)
        return [answers[start : start + size] for start in range(0, len(answers), size)]

    def _with_verdicts(self, case: _Case, found: list[list[list[bool]]]) -> _Case:
        answers = [own for call in self._calls(case) for own in call]
        verdicts = [own for call in found for own in call]
        by_answer = {(own.source, own.index): given for own, given in zip(answers, verdicts, strict=True)}
        return _Case(case.group, case.teacher, case.student, case.rubric, by_answer)

    def _graded(self, case: _Case, verified: Sequence[Grade | None]) -> list[Grade | None]:
        rubric, verdicts = case.rubric, case.verdicts
        assert rubric is not None and verdicts is not None  # every stage was passed
        whole = rubric.maximum_score + self._plan.epsilon
        teacher = [rubric.earned(verdicts["teacher", index]) / whole for index in range(len(case.teacher))]
        student = [rubric.earned(verdicts["student", index]) / whole for index in range(len(case.student))]
        mean = sum(teacher) / len(teacher)
        shared = {
            measured.FAILED: 0.0,
            measured.CRITERIA: float(len(rubric.criteria)),
            measured.REFERENCES: float(len(teacher)),
            measured.TEACHER: mean,
            measured.TEACHER_LOW: min(teacher),
            measured.TEACHER_HIGH: max(teacher),
            measured.BELOW: float(mean < sum(student) / len(student)),
        }
        return [
            Grade(
                score,
                _beside(verified[index]),
                measures={**shared, measured.SCORE: score, **_passed(rubric, verdicts["student", index])},
            )
            for index, score in enumerate(student)
        ]


def _with_rubric(case: _Case, found: list[Rubric]) -> _Case:
    return _Case(case.group, case.teacher, case.student, found[0])


def _failed(failure: Failure, verified: Sequence[Grade | None]) -> list[Grade | None]:
    """The grades of a group without a usable verdict: alike, so that nothing is learnt from it."""
    why = visible(shortened(f"{failure.reason}: {failure.message}", 300))
    return [Grade(0.0, _beside(own), why, measures={measured.FAILED: 1.0}) for own in verified]


def _beside(verified: Grade | None) -> dict[str, float]:
    """What the task's own grader found, as parts of the reward that are recorded alone."""
    return {} if verified is None else {measured.VERIFIED: verified.reward, **verified.parts}


def _passed(rubric: Rubric, verdicts: Sequence[bool]) -> dict[str, float]:
    """The share of each category's criteria that hold."""
    found: dict[str, float] = {}
    for category in CATEGORIES:
        own = [
            holds for criterion, holds in zip(rubric.criteria, verdicts, strict=True) if criterion.category == category
        ]
        if own:
            found[f"{measured.PASSED}{category}"] = sum(own) / len(own)
    return found
