"""Which of two privileged policies teaches a token, and how strongly. Axis letters: see `retort.core`.

DOPD, arXiv 2606.30626. A teacher and the student itself read the hint; the student that learns does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import PROBABILITY, SAMPLED
from retort.core.parts import Quantity, Stat, Weight, unchanged
from retort.core.steps import Clock, Steps
from retort.errors import UserError

#: Regimes: both agree and are sure, both agree and are not, the teacher or the student prefers the token by far.
AGREED, VAGUE, TEACHER, STUDENT = 0, 1, 2, 3


def trimmed_mean(values_N: Tensor, share: float) -> Tensor:
    """The mean of all but the largest ceil(share N), at least of the smallest one; a scalar."""
    kept = max(1, len(values_N) - math.ceil(share * len(values_N)))
    return values_N.sort().values[:kept].mean()


def regimes(teacher_logp_N: Tensor, student_logp_N: Tensor, trim: float) -> Tensor:
    r"""The regime of each step, by the size of the gap and by the sum of both probabilities, [N].

    `TEACHER` where :math:`|l_T - l_S| \ge \bar A` and :math:`q_T \ge q_S`, `STUDENT` where :math:`q_T < q_S`.
    Below :math:`\bar A`, `AGREED` where :math:`q_S + q_T \ge \bar q_S + \bar q_T`, else `VAGUE`. Where all gaps are
    equal none is below their mean, and all steps are `TEACHER` or `STUDENT`.

    Args:
        teacher_logp_N: Log-prob of the sampled token under the privileged teacher, nats.
        student_logp_N: Log-prob under the privileged student, nats.
        trim: Share of the largest values that each mean leaves out.
    """
    gap_N = (teacher_logp_N - student_logp_N).abs()
    # Both rule the token out: they do not differ at it.
    gap_N = torch.where(teacher_logp_N == student_logp_N, torch.zeros_like(gap_N), gap_N)
    q_T, q_S = teacher_logp_N.exp(), student_logp_N.exp()
    far_N = gap_N >= trimmed_mean(gap_N, trim)
    sure_N = q_S + q_T >= trimmed_mean(q_S, trim) + trimmed_mean(q_T, trim)
    near_N = torch.where(sure_N, AGREED, VAGUE)
    return torch.where(far_N, torch.where(teacher_logp_N >= student_logp_N, TEACHER, STUDENT), near_N)


class Regimes:
    """The weights of a batch's regimes; they share the statistics behind them."""

    def __init__(
        self, *, trim: float, teacher: str = "teacher", student: str = "student", name: str = "regime"
    ) -> None:
        """Builds the regimes of two views.

        Args:
            trim: See `regimes`.
            teacher: View of the privileged teacher.
            student: View of the privileged student.
            name: Name of the stored values: `<name>`, `<name>.teacher_logp` and `<name>.student_logp`, nats.

        Raises:
            UserError: The share of outliers leaves nothing.
        """
        if not 0.0 <= trim < 1.0:
            raise UserError(f"regimes: the share of outliers left out must lie in [0, 1), not {trim}")
        views = {teacher: frozenset({SAMPLED}), student: frozenset({SAMPLED})}

        def logp(of: str) -> Quantity:
            def value(context: Context, view: str) -> Tensor:
                return context.signal(of).sampled_logp_N

            # Each statistic needs both views, so that steps without a context under one of them enter no mean.
            return Quantity(f"{of}_logp", value, also=views, student_needs=frozenset({PROBABILITY}))

        def finish(teacher_logp_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
            student_logp_N = steps.stored[f"{name}.student_logp"]
            found_N = regimes(teacher_logp_N.double(), student_logp_N.double(), trim)
            return found_N.to(teacher_logp_N.dtype)

        self.name = name
        self.stats = (
            Stat(f"{name}.teacher_logp", logp(teacher), unchanged),
            Stat(f"{name}.student_logp", logp(student), unchanged),
            Stat(name, logp(teacher), finish),
        )

    def weight(self, regime: int) -> Weight:
        """1 in a regime, 0 elsewhere."""

        def value(context: Context, view: str) -> Tensor:
            regime_N = context.steps.stored[self.name]
            return (regime_N == regime).to(context.student_logp_N.dtype)

        return Weight(f"{self.name} {regime}", value, stats=self.stats)

    def gap(self) -> Quantity:
        """The privileged teacher's log-prob of the sampled token minus the privileged student's, nats, to watch."""

        def value(context: Context, view: str) -> Tensor:
            return context.steps.stored[f"{self.name}.teacher_logp"] - context.steps.stored[f"{self.name}.student_logp"]

        return Quantity("privileged_gap", value)
