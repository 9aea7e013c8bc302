"""What a part, an estimator or a statistic of somebody's own gives is one number per step, or the run ends in one line.

Anything else would broadcast: [N, 1] beside [N] is [N, N], and a loss that is N times too large and looks like one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Advantage, Baseline, Divergence, Part, Stat, Weight
from retort.divergences import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.estimators.pathwise import Pathwise
from retort.functional import token_losses
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan

Shape = Callable[[Tensor], Tensor]
SHAPES: dict[str, Shape] = {"a scalar": Tensor.mean, "[1]": lambda x: x.mean()[None], "[N, 1]": lambda x: x[:, None]}


def part(kind: Callable[..., Any], shape: Shape) -> Any:
    return kind("odd", lambda context, view: shape(context.student_logp_N.exp()))


def weighed(stat: Shape) -> Weight:
    own = Stat("odd", part(Part, lambda x: x), lambda values_N, steps, clock: stat(values_N))
    return Weight("stored", lambda context, view: context.steps.stored["odd"], stats=(own,))


@dataclass(frozen=True)
class UserGrading(Pathwise):
    shape: Shape = Tensor.mean

    def token_loss(self, context: Context, view: str, term: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        value_N, weight_N = super().token_loss(context, view, term, weight_N)
        return self.shape(value_N), weight_N


TERMS: dict[str, Callable[[Shape], Term]] = {
    "divergence": lambda shape: Term("t", pathwise(part(Divergence, shape))),
    "weight": lambda shape: Term("t", pathwise(reverse_kl()), weight=part(Weight, shape)),
    "advantage": lambda shape: Term("t", score_function(part(Advantage, shape), clip=0.2)),
    "baseline": lambda shape: Term(
        "t", score_function(part(Advantage, lambda x: x), baseline=part(Baseline, shape), clip=0.2)
    ),
    "statistic": lambda shape: Term("t", pathwise(reverse_kl()), weight=weighed(shape)),
    "estimator": lambda shape: Term("t", UserGrading(reverse_kl(), shape)),
}


def loss(term: Term) -> float:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    method = Method(name="own", rollout=RolloutPlan(), terms=(term,))
    return float(token_losses(method, student_logits=student, teacher_logits=teacher, tokens=torch.arange(4)).loss)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_anything_else_is_refused_in_one_line(term: Callable[[Shape], Term], shape: Shape) -> None:
    assert math.isfinite(loss(term(lambda x: x)))  # the same with one number per step is fine
    with pytest.raises(UserError, match=r"gave \(.*\) for 4 steps; give one number per step, \[N\]") as raised:
        loss(term(shape))
    assert "'odd'" in str(raised.value) or "term 't'" in str(raised.value)
    assert "\n" not in str(raised.value)
