"""How a method wants its training rollouts to be graded, where it does not learn from the task's own grader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retort.core.rollouts import Rollout
from retort.errors import UnreachableError, UserError

#: Measures of a rollout that was graded by a rubric.
FAILED, SCORE, CRITERIA, REFERENCES = "judge/fallback", "judge/score", "judge/criteria", "judge/references"
TEACHER, TEACHER_LOW, TEACHER_HIGH = "judge/teacher_score", "judge/teacher_score_min", "judge/teacher_score_max"
BELOW = "judge/teacher_below_student"
#: Share of a category's criteria that hold, by category.
PASSED = "judge/passed/"
#: Part of the reward that the task's own grader gave, where there is one: never what is learnt from.
VERIFIED = "verified"


@dataclass(frozen=True)
class RubricPlan:
    """A plan: a model that talks makes one rubric for each prompt, and decides for every answer which criteria hold.

    Attributes:
        references: Answers of the teacher to a prompt, that the rubric is drawn from and that are graded among the
            student's; identical ones count once.
        reference_temperature: Temperature at which the teacher answers, positive: at 0 all its answers were one.
        rubric_temperature: Temperature of the rubricator. Verdicts are asked for at 0.
        per_call: Answers that are judged in one call; None: all of a group.
        epsilon: Added to the points that the reward is divided by; 0: none.
        max_fallback_rate: Largest share of a batch's groups that may go without a usable verdict; beyond it the run
            stops.
        reference_tokens: Tokens of the teacher's longest answer.
        rubric_tokens: Tokens of the longest rubric.
        verdict_tokens: Tokens of the longest answer with verdicts.

    Raises:
        UserError: A number that makes no sense.
    """

    references: int = 4
    reference_temperature: float = 1.0
    rubric_temperature: float = 0.7
    per_call: int | None = None
    epsilon: float = 0.0
    max_fallback_rate: float = 0.4
    reference_tokens: int = 2048
    rubric_tokens: int = 8192
    verdict_tokens: int = 4096

    def __post_init__(self) -> None:
        counts = ("references", "reference_tokens", "rubric_tokens", "verdict_tokens", "per_call")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"method.{name} must be at least 1, not {value}")
        if self.reference_temperature <= 0:
            raise UserError(
                f"method.reference_temperature must be positive, not {self.reference_temperature:g}: at 0 all answers "
                "of the teacher would be one, and a rubric drawn from one answer wants that answer"
            )
        if self.rubric_temperature < 0 or self.epsilon < 0:
            raise UserError("method.rubric_temperature and method.epsilon must not be negative")
        if not 0 <= self.max_fallback_rate <= 1:
            raise UserError(f"method.max_fallback_rate must lie in [0, 1], not {self.max_fallback_rate:g}")

    def check(self, rollouts: Sequence[Rollout]) -> None:
        """Stops a run whose judge fails too often.

        Args:
            rollouts: The graded rollouts of a batch, of all ranks.

        Raises:
            UnreachableError: More than `max_fallback_rate` of the groups have no usable verdict.
        """
        groups = {(own.prompt.id, own.visit) for own in rollouts}
        failed = {(own.prompt.id, own.visit): own.feedback for own in rollouts if own.measures.get(FAILED)}
        if len(failed) > self.max_fallback_rate * len(groups):
            raise UnreachableError(
                f"the judge gave no usable verdict for {len(failed)} of {len(groups)} groups, more than "
                f"method.max_fallback_rate = {self.max_fallback_rate:g} allows; the last: {[*failed.values()][-1]}"
            )
