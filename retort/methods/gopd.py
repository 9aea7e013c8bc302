"""G-OPD: the teacher's implicit reward, relative to a base model, at a weight of one's choice."""

from retort.advantages import extrapolated_log_ratio, log_ratio
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View
from retort.weights import truncated_rollout_ratio


@method(
    paper=Paper(
        title="Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        authors="Yang, Wenkai and others",
        year=2026,
        arxiv="2602.12125",
    ),
    status="faithful",
)
def gopd(
    *,
    reward_weight: float = 1.25,
    clip: float | None = 0.2,
    truncation: Unbounded | None = 5.0,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL with the teacher's implicit reward at a free weight: below 1 blends, above 1 extrapolates.

    .. math:: A_t = \lambda\,[\log p_T(y_t) - \log p_B(y_t)] - [\log p_{old}(y_t) - \log p_B(y_t)]

    whose optimum is :math:`p_T^\lambda\,p_B^{1-\lambda}`, normalised. The loss is PPO's on this advantage times the
    truncated importance ratio of trainer to rollout engine; nats, divided by all counted tokens. The base
    :math:`p_B` is a second frozen model (`base` of a run): the student before training, or, for what the paper calls
    reward correction, the teacher before its own reinforcement learning. At lambda = 1 the base cancels, and no base
    model is loaded.

    Args:
        reward_weight: lambda >= 0, dimensionless (released script: 1.25; the paper saw 1.5 become unstable).
        clip: PPO's epsilon, both sides, on the ratio to the student before the batch; null for none. The default of
            the framework that the released code runs in.
        truncation: Largest importance ratio of trainer to rollout engine; null for no correction.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Departures from the released code: lambda = 1 is the same formula and not a branch of its own. Its two teachers by
    domain are settings of the run (`teachers`).

    Example:
        >>> student, teacher, base = (tensor([[p, 1 - p]] * 2).log() for p in (2 / 3, 0.8, 0.5))
        >>> given = {"tokens": tensor([0, 1]), "extra_views": {"base": base}}
        >>> method = retort.load("gopd", reward_weight=0.5)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["reverse"].value  # at the optimum, sqrt(0.8 * 0.5) : sqrt(0.2 * 0.5), all are alike
        tensor([0.0527, 0.0527])
    """
    if reward_weight < 0:
        raise UserError(f"method.reward_weight must be at least 0, not {reward_weight:g}")
    plain = reward_weight == 1.0
    advantage = log_ratio() if plain else extrapolated_log_ratio(reward_weight)
    score = score_function(advantage, clip=clip)
    views = {"teacher": View.same_prompt()}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views=views if plain else {**views, "base": View.base()},
        temperature=temperature,
        terms=(Term("reverse", score, weight=None if truncation is None else truncated_rollout_ratio(truncation)),),
        limits=(
            Limit({"reward_weight": 1.0, "clip": None, "truncation": None}, equals=("opd", {})),
            Limit({"reward_weight": 1.25}, equals=("exopd", {})),
        ),
        recipe={
            "rollout": {"prompts": 1024, "max_new_tokens": 16384, "max_prompt_tokens": 2048},
            "optimizer": {"learning_rate": 1e-5, "schedule": "constant", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("reverse")),
        ),
    )
