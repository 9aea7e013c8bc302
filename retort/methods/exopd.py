"""ExOPD: G-OPD beyond the teacher."""

from dataclasses import replace

from retort.errors import UserError
from retort.method import Limit, Method, Paper, Unbounded, method
from retort.methods.gopd import gopd


@method(
    paper=Paper(
        title="Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        authors="Yang, Wenkai and others",
        year=2026,
        arxiv="2602.12125",
    ),
    status="faithful",
)
def exopd(
    *,
    reward_weight: float = 1.25,
    clip: float | None = 0.2,
    truncation: Unbounded | None = 5.0,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL that rewards the difference between teacher and base model more than imitation would.

    .. math:: A_t = \lambda\,[\log p_T(y_t) - \log p_B(y_t)] - [\log p_{old}(y_t) - \log p_B(y_t)]

    with :math:`\lambda > 1`: the optimum :math:`p_T^\lambda\,p_B^{1-\lambda}`, normalised, lies beyond the teacher on
    the way from the base. It is `gopd` with the paper's setting for extrapolation, and refuses a lambda below 1; units,
    denominator and base are as there. If the structure of outputs is almost deterministic, too large a lambda breaks
    it: see `listopd`.

    Args:
        reward_weight: lambda >= 1, dimensionless (released script: 1.25; the paper saw 1.5 become unstable).
        clip: PPO's epsilon, both sides, on the ratio to the student before the batch; null for none. The default of
            the framework that the released code runs in.
        truncation: Largest importance ratio of trainer to rollout engine; null for no correction.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Departures from the released code: lambda = 1 is the same formula and not a branch of its own; routing between two
    teachers is not offered here.

    Example:
        >>> student, teacher, base = (tensor([[p, 1 - p]]).log() for p in (0.5, 0.8, 0.5))
        >>> given = {"tokens": tensor([0]), "extra_views": {"base": base}}
        >>> losses = token_losses("exopd", student_logits=student, teacher_logits=teacher, **given)
        >>> losses.loss  # -1.25 ln(0.8 / 0.5); `opd`, which has no base, gives -ln(0.8 / 0.5) = -0.47
        tensor(-0.5875)
    """
    if reward_weight < 1:
        raise UserError(f"method.reward_weight must be at least 1, not {reward_weight:g}; below 1 it is `gopd`")
    made = gopd(reward_weight=reward_weight, clip=clip, truncation=truncation, samples=samples, temperature=temperature)
    limits = (
        Limit({"reward_weight": 1.0, "clip": None, "truncation": None}, equals=("opd", {})),
        Limit({"reward_weight": 1.4}, equals=("gopd", {"reward_weight": 1.4})),
    )
    return replace(made, limits=limits)
