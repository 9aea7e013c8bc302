"""How far distributions are from flat. Axis letters: see `retort.core`."""

from __future__ import annotations

from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import DENSE
from retort.core.parts import Quantity


def _variance(distribution: Distribution) -> Tensor:
    shard = distribution.shard
    square_C = shard.sum(distribution.p_CV.square().sum(-1))
    width = shard.sum(square_C.new_full((), distribution.p_CV.shape[-1]))
    return square_C / width - width.reciprocal().square()


def teacher_variance() -> Quantity:
    """Variance of the teacher's probabilities over the vocabulary: (sum p^2) / V - 1 / V^2, no unit."""

    def value(context: Context, view: str) -> Tensor:
        return _variance(context.signal(view).distribution)

    return Quantity("teacher_variance", value, frozenset({DENSE}))


def student_variance() -> Quantity:
    """Variance of the student's probabilities over the vocabulary, detached: (sum p^2) / V - 1 / V^2, no unit."""

    def value(context: Context, view: str) -> Tensor:
        return _variance(context.student)

    return Quantity("student_variance", value, student_needs=frozenset({DENSE}))
