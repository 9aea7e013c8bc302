"""The weight at which extrapolating beyond a teacher breaks an almost deterministic structure: a prediction, no bound.

From "The Extrapolation Cliff in On-Policy Distillation of Near-Deterministic Structured Outputs" (arXiv 2605.08737).
Everything is about one position of the structure, reduced to two outcomes: the teacher's most likely token, and the
rest. `teacher_mass` (p), `base_mass` (b) and the student's mass (q) are the probabilities that each gives to that
token; `cap` (c) is the largest importance ratio.
"""

from __future__ import annotations

import math

from retort.errors import UserError

#: Measured midpoints of the paper's cliff, by optimizer steps: the two from which its prediction for 200 follows.
PAPER_MIDPOINTS = ((42, 1.22), (70, 1.12))


def lambda_star(teacher_mass: float, base_mass: float, cap: float) -> float:
    r"""The reward weight at which the target of extrapolation leaves the region where no ratio is capped (Eq. 4).

    .. math:: \lambda^* = 1 + \frac{\log(1 + (c - 1) / p)}{\mathrm{logit}\,p - \mathrm{logit}\,b}

    Args:
        teacher_mass: p, between 0 and 1.
        base_mass: b, between 0 and 1.
        cap: c, at least 1.

    Returns:
        lambda*, above 1. Infinity where the base is at least as sure as the teacher: extrapolating then lowers the
        mass, and there is no upper cliff (Eq. 4 itself gives a meaningless number there).

    Raises:
        UserError: A mass outside of (0, 1), or a cap below 1.
    """
    for name, mass in (("teacher_mass", teacher_mass), ("base_mass", base_mass)):
        if not 0.0 < mass < 1.0:
            raise UserError(f"{name} must lie strictly between 0 and 1, not {mass:g}")
    if cap < 1.0:
        raise UserError(f"cap must be at least 1, not {cap:g}")
    if teacher_mass <= base_mass:
        return math.inf
    return 1.0 + math.log1p((cap - 1.0) / teacher_mass) / (logit(teacher_mass) - logit(base_mass))


def target_mass(teacher_mass: float, base_mass: float, reward_weight: float) -> float:
    r"""The mass that extrapolation drives the student to.

    .. math:: \mathrm{logit}\,q = \lambda\,\mathrm{logit}\,p + (1 - \lambda)\,\mathrm{logit}\,b

    Args:
        teacher_mass: p.
        base_mass: b.
        reward_weight: lambda.
    """
    return 1.0 / (1.0 + math.exp(-reward_weight * logit(teacher_mass) - (1.0 - reward_weight) * logit(base_mass)))


def capped_from(teacher_mass: float, cap: float) -> float:
    """The student's mass above which the ratio of the rest, (1 - p) / (1 - q), is above the cap: 1 - (1 - p) / c."""
    return 1.0 - (1.0 - teacher_mass) / cap


def implied_base_mass(teacher_mass: float, log_ratio: float) -> float:
    """The base's mass from a mean log-ratio of teacher to base, nats: p exp(-ratio); the paper's published 0.81."""
    return teacher_mass * math.exp(-log_ratio)


def budget_midpoint(steps: int, points: tuple[tuple[int, float], ...] = PAPER_MIDPOINTS) -> float:
    """The midpoint of a cliff at one budget from those at two others: a line through both in one over the steps.

    Args:
        steps: Optimizer steps.
        points: Two of (steps, midpoint).
    """
    (first, high), (second, low) = points
    slope = (high - low) / (1.0 / first - 1.0 / second)
    return low + slope * (1.0 / steps - 1.0 / second)


def with_budget(threshold: float, steps: int) -> float:
    """Moves a threshold by as much as the paper's measured cliff moves from its shortest budget to this one.

    The paper gives no formula: its Corollary 4.2 does not depend on p, b or c, and the cliff that it measures moves
    left with the steps, below the closed form. Using its measured movement is a reconstruction. The result is never
    below 1, and never above the threshold.
    """
    shift = budget_midpoint(PAPER_MIDPOINTS[0][0]) - budget_midpoint(max(steps, PAPER_MIDPOINTS[0][0]))
    return max(1.0, threshold - shift)


def drift_steps(learning_rate: float, reward_weight: float, teacher_mass: float) -> float:
    r"""Optimizer steps after which a linearised drift has moved by its own size (Corollary 4.2): a diagnostic.

    .. math:: N = 1 / |\log(1 - \eta \lambda p (1 - p))|

    Args:
        learning_rate: eta, of plain gradient descent on a logit.
        reward_weight: lambda.
        teacher_mass: p.
    """
    return 1.0 / abs(math.log1p(-learning_rate * reward_weight * teacher_mass * (1.0 - teacher_mass)))


def logit(mass: float) -> float:
    """Log-odds of a probability."""
    return math.log(mass) - math.log1p(-mass)
