"""ListOPD: extrapolation beyond the teacher on structured outputs, with the cliff it would fall off in sight."""

from typing import Literal

from retort.advantages import capped_log_ratio, extrapolated_log_ratio
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import cliff, masses, sampled_reverse_kl, student_entropy, student_tail, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View
from retort.weights import on_contract, truncated_rollout_ratio, truncated_teacher_ratio


@method(
    paper=Paper(
        title="The Extrapolation Cliff in On-Policy Distillation of Near-Deterministic Structured Outputs",
        authors="Li, Xin and Jiang, Hao and Wang, Annan and Zhang, Yichi and Yuen, Chau",
        year=2026,
        arxiv="2605.08737",
    ),
    status="partial",
)
def listopd(
    *,
    reward_weight: float = 1.15,
    cap: Unbounded = 5.0,
    ratio: Literal["train_rollout", "teacher_student", "none"] = "train_rollout",
    hold: bool = False,
    margin: float = 0.05,
    contract: float = 0.9,
    base_mode: Literal["implied", "direct"] = "implied",
    clip: float | None = 0.2,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Extrapolated sampled reverse KL, with a prediction of the reward weight at which structure breaks.

    .. math:: A_t = \lambda\,[\log p_T(y_t) - \log p_B(y_t)] - [\log p_{old}(y_t) - \log p_B(y_t)], \quad
              \lambda^*(p, b, c) = 1 + \frac{\log(1 + (c - 1)/p)}{\mathrm{logit}\,p - \mathrm{logit}\,b}

    p and b are the probabilities that teacher and base give to the teacher's most likely token at contract positions
    (those where it has at least `contract`), measured on every batch of student rollouts. The report draws lambda* for
    the largest rollout mean of p (`lambda_star_safe`) and for the mean (`lambda_star_typical`), the former moved to the
    run's number of steps (`lambda_star_budget`), and the student's tail 1 - q against the boundary (1 - p) / c.
    **lambda* is a prediction of where the structure begins to break and not a safe bound**: it is an asymptotic
    crossing, the paper's own cliff lies below it at long budgets (1.06 where it says 1.18), and it presumes one
    dominant kind of almost certain position. On the built-in task `ranking` no cliff was found there
    (docs/lab/cliff.md).
    The loss is in nats and divided by all counted tokens.

    Args:
        reward_weight: lambda, dimensionless (paper, at 42 steps: 1.15).
        cap: c, the largest importance ratio.
        ratio: The ratio that is capped: `train_rollout`, as the paper's configuration has it; `teacher_student`, as its
            Eq. 3 prints it, which also moves what the student is driven to; `none`.
        hold: Keep lambda, batch by batch, `margin` below `lambda_star_budget`, but not below 1.
        margin: Distance that `hold` keeps; the paper's grid step.
        contract: tau, probability.
        base_mode: b from the mean log-ratio of teacher to base, p exp(-mean), or `direct`, its mean probability. The
            paper's two ways differ (0.81 and 0.998 on its data), and lambda* with them.
        clip: PPO's epsilon, both sides; null for none.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Partial: classes of positions are not told apart (b is over all of them, the paper's at the binding one), p and b
    are measured on rollouts and not in a greedy pass of the teacher, the correction for the number of steps takes over
    the paper's measured movement because no formula is printed, and `hold` is this library's rule. The base is asked
    for its whole distribution, and every batch takes one more pass of the student, to measure before the update.

    Example:
        >>> student, teacher, base = (tensor([[p, 1 - p]]).log() for p in (0.5, 0.95, 0.5))
        >>> method, given = retort.load("listopd", reward_weight=2.0, hold=True), {"extra_views": {"base": base}}
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]), **given)
        >>> losses.loss / tensor(0.5 / 0.95).log()  # lambda, held 0.05 below 1 + ln(1 + 4 / 0.95) / ln 19 = 1.5606
        tensor(1.5106)
    """
    if reward_weight < 0 or margin < 0:
        raise UserError(f"method.reward_weight and margin must be at least 0, not {reward_weight:g} and {margin:g}")
    measured = masses(contract, "base", base_mode)
    held = capped_log_ratio(reward_weight, cap, margin, base_mode, measured)
    free = extrapolated_log_ratio(reward_weight, stats=measured)
    score = score_function(held if hold else free, clip=clip)
    weights = {"train_rollout": truncated_rollout_ratio, "teacher_student": truncated_teacher_ratio}
    structure = on_contract(contract)
    kinds = ("safe", "typical", "budget", "tail_boundary", "teacher_mass", "base_mass")
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": View.same_prompt(), "base": View.base()},
        temperature=temperature,
        terms=(Term("reverse", score, weight=weights[ratio](cap) if ratio in weights else None),),
        limits=(
            Limit({"reward_weight": 1.0, "ratio": "none", "clip": None}, equals=("opd", {})),
            Limit({"reward_weight": 1.4}, equals=("exopd", {"reward_weight": 1.4})),
        ),
        recipe={
            "rollout": {"prompts": 128, "max_new_tokens": 512, "max_prompt_tokens": 2048},
            "optimizer": {"learning_rate": 1e-6, "schedule": "constant", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("contract_fraction", structure),
            Watch("contract_tail", student_tail(), where=structure),
            *(Watch(part.name, part) for part in (cliff(kind, cap, base_mode) for kind in kinds)),
            Watch("reward_weight", cliff("in_effect", cap, base_mode, reward_weight, margin if hold else None)),
        ),
    )
