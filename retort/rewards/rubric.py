"""Rubrics: weighted criteria, each decided true or false for one answer, and the score that they add up to.

From ROPD, arXiv 2605.07396. This file knows no model and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from retort.errors import UserError, counted

__all__ = ["Criterion", "Rubric", "rubric_score"]

#: A text with something in it.
Words = Annotated[str, Field(min_length=1, max_length=4000)]


def rubric_score(points: Sequence[float], verdicts: Sequence[bool | int]) -> float:
    """The share of a rubric's points that an answer earns: from 0, no criterion holds, to 1, all do. Dimensionless.

    Args:
        points: Points of each criterion, positive; only their ratios matter.
        verdicts: Whether each criterion holds, true or false (1 or 0), in the same order.

    Raises:
        UserError: There is no criterion, numbers differ, points are not positive, or a verdict is neither true nor
            false.

    Example:
        >>> from retort.rewards import rubric_score
        >>> round(rubric_score([5, 5, 4, 5, 3], [1, 0, 1, 1, 1]), 4)  # 17 of 22
        0.7727
    """
    if not points:
        raise UserError("rubric_score: a rubric has at least one criterion, and points are empty")
    if len(points) != len(verdicts):
        raise UserError(
            f"rubric_score: {counted(len(verdicts), 'verdict')} for {counted(len(points), 'criterion', 'criteria')}"
        )
    if not all(0 < own < float("inf") for own in points):
        raise UserError(f"rubric_score: points must be positive numbers, not {list(points)}")
    if not all(own in (0, 1) for own in verdicts):
        raise UserError(f"rubric_score: verdicts are true or false, not {list(verdicts)}")
    earned = sum(own for own, holds in zip(points, verdicts, strict=True) if holds)
    return float(earned / sum(points))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(_Strict):
    """One question about an answer that is decided true or false from that answer alone.

    Attributes:
        id: Its name within the rubric.
        text: What must hold.
        category: What it is about, in a word or two; curves of a run are by category.
        points: Its weight: 1 (routine), 2 (supporting), 3 (rare), 4 (tells answers apart) or 5 (decisive).
    """

    id: Annotated[str, Field(min_length=1, max_length=100)]
    text: Words
    category: Annotated[str, Field(min_length=1, max_length=100)]
    points: Annotated[StrictInt, Field(ge=1, le=5)]


class Rubric(_Strict):
    """The criteria by which all answers to one prompt are graded.

    Attributes:
        criteria: At least one, each with an id of its own.
        maximum_score: The sum of their points.

    Raises:
        pydantic.ValidationError: An id is there twice, points lie outside of 1 to 5, or the maximum is not their sum.

    Example:
        >>> from retort.rewards import Criterion, Rubric
        >>> right = Criterion(id="right", text="The last result is 45.", category="task", points=5)
        >>> Rubric(criteria=[right], maximum_score=5).score([True])
        1.0
    """

    criteria: Annotated[list[Criterion], Field(min_length=1)]
    maximum_score: StrictInt

    @model_validator(mode="after")
    def _adds_up(self) -> Rubric:
        ids = [criterion.id for criterion in self.criteria]
        twice = next((own for own in ids if ids.count(own) > 1), None)
        if twice is not None:
            raise PydanticCustomError("rubric", "two criteria have the id '{id}'", {"id": twice})
        total = sum(self.points)
        if self.maximum_score != total:
            values = {"given": self.maximum_score, "total": total}
            raise PydanticCustomError("rubric", "maximum_score is {given}, and the points add up to {total}", values)
        return self

    @property
    def points(self) -> list[int]:
        """The points of each criterion, in order."""
        return [criterion.points for criterion in self.criteria]

    def earned(self, verdicts: Sequence[bool]) -> int:
        """The points of the criteria that hold.

        Args:
            verdicts: Whether each criterion holds, in order.
        """
        return sum(own for own, holds in zip(self.points, verdicts, strict=True) if holds)

    def score(self, verdicts: Sequence[bool]) -> float:
        """The share of the points: see `rubric_score`."""
        return rubric_score(self.points, verdicts)
