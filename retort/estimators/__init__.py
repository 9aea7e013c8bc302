"""Estimators: how a divergence or an advantage becomes a gradient."""

from retort.estimators.base import Estimator
from retort.estimators.baselines import reverse_kl_value
from retort.estimators.hidden import MatchHidden, match_hidden, mean_square
from retort.estimators.pathwise import Pathwise, pathwise
from retort.estimators.score import ScoreFunction, score_function

__all__ = [
    "Estimator",
    "MatchHidden",
    "Pathwise",
    "ScoreFunction",
    "match_hidden",
    "mean_square",
    "pathwise",
    "reverse_kl_value",
    "score_function",
]
