"""PowerOPD: a bounded reward in the place of the log-ratio."""

from typing import Literal

from retort.advantages import clipped_log_ratio, log_ratio, lower_clip, power_difference, tanh_log_ratio
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="PowerOPD: Stabilizing On-Policy Distillation with Bounded Power Transformation",
        authors="Zhao, Anhao and Tong, Junlong and Fan, Yingqi and Nie, Ping and Li, Wenjie and Shen, Xiaoyu",
        year=2026,
        arxiv="2606.17199",
    ),
    status="faithful",
)
def power_opd(
    *,
    power: float = 5.0,
    reward: Literal["power", "log_ratio", "clip", "tanh", "lower_clip"] = "power",
    bound: Unbounded = 5.0,
    lower: float = 0.3,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Method:
    r"""Sampled OPD whose reward is a difference of powers of probabilities: bounded, of the same sign as the log-ratio.

    .. math:: \ell_t = -\rho_t A_t, \quad A_t = p_T(y_t)^\alpha - p_{old}(y_t)^\alpha

    Its fixed point is p_S = p_T, but it is no gradient of a KL: it descends another objective. The factor 1/alpha of
    the Box-Cox transform is left to the learning rate, so a large alpha makes small steps.

    From a teacher with another tokenizer, p is the probability of a unit of tokens, as in `opd`; a longer unit is less
    likely, so its reward is smaller.

    Args:
        power: alpha; the released README's default (its configuration has 0.1, the paper sweeps 0.1 to 500).
        reward: `power`, or the baselines it is compared with: the log-ratio, clipped on both sides at `bound`, its tanh
            over `bound`, or clipped from below only (REOPOLD).
        bound: Bound of `clip` and `tanh`, nats; the scripts' default, the paper's best clip is 1.
        lower: lambda of `lower_clip`: the bound is ln(lambda) / (1 - lambda), -1.72 nats at 0.3.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.
        top_p: Top-p of sampling. The released script has 0.95 with the 20 most likely ids.

    Departures from the released code: rollouts are not truncated by default, and never to a top-k; the final stop token
    is taught like any other (there it is masked).

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.8, 0.2]]).log()
        >>> losses = token_losses("power_opd", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # -(0.8 ** 5 - 0.5 ** 5), which is never below -1
        tensor(-0.2964)
    """
    advantage = {
        "power": lambda: power_difference(power),
        "log_ratio": log_ratio,
        "clip": lambda: clipped_log_ratio(-bound, bound),
        "tanh": lambda: tanh_log_ratio(bound),
        "lower_clip": lambda: clipped_log_ratio(lower_clip(lower)),
    }[reward]()
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        temperature=temperature,
        terms=(Term("reverse", score_function(advantage)),),
        limits=(
            Limit({"reward": "log_ratio"}, equals=("opd", {})),
            Limit({"reward": "clip", "bound": 1e9}, equals=("opd", {})),
            Limit({"reward": "lower_clip", "lower": 1e-300}, equals=("opd", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 1024},
            "optimizer": {"learning_rate": 5e-7, "schedule": "constant", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
