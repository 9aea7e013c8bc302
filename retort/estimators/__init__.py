"""How a disagreement becomes a gradient."""

from retort.estimators.baselines import reverse_kl_value
from retort.estimators.pathwise import Pathwise, pathwise
from retort.estimators.score import ScoreFunction, score_function

Estimator = Pathwise | ScoreFunction

__all__ = ["Estimator", "Pathwise", "ScoreFunction", "pathwise", "reverse_kl_value", "score_function"]
