"""Uni-OPD: the sampled reverse KL on balanced rollouts, by a teacher that is made to rank right above wrong."""

import math
from typing import Literal

from retort.advantages.outcome import Scope
from retort.core.reduce import rollout_means, tokens, weighted
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, stored_quantity, student_entropy
from retort.rollout.plan import EasyToHard, RolloutPlan
from retort.weights import both
from retort.weights import calibration as parts


@method(
    paper=Paper(
        title="Uni-OPD: Unifying On-Policy Distillation with a Dual-Perspective Recipe",
        authors="Hou, Wenjin and Peng, Shangpin and Wang, Weinong and Ruan, Zheng and Zhang, Yue and others",
        year=2026,
        arxiv="2605.03677",
        url="https://github.com/WenjinHou/Uni-OPD",
    ),
    status="partial",
)
def uni_opd(
    *,
    balance: Unbounded | None = 1.0,
    balance_scope: Scope = "group",
    calibration: Literal["shift", "mask"] | None = "shift",
    margin: Unbounded = 0.4,
    margin_gap: Literal["mean", "minmax"] = "mean",
    margin_scope: Scope = "group",
    margin_direction: Literal["both", "correct_up", "incorrect_down"] = "both",
    margin_retained: float = 0.25,
    margin_over: Literal["all", "kept"] = "all",
    gap_limit: Unbounded = 10.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    success_threshold: float = 0.5,
    reduction: Literal["rollouts", "tokens"] = "rollouts",
    difficulty: Literal["balanced"] | None = None,
    samples: int = 16,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL, with right and wrong rollouts balanced and the teacher's preference between them calibrated.

    .. math:: A_t = \log p_T(y_t) - \log p_{old}(y_t) \pm \tfrac12 \max(0, m - g_G)

    g_G is the gap of a prompt's rollouts, nats: the mean over the right ones of their mean log-ratio, less that over
    the wrong ones; + holds for the right ones. A_t enters PPO's clipped loss; a token on which the models differ by
    `gap_limit` nats or more gives none. Rollouts drawn to be left out leave the denominator, too: it is the mean over
    the others of the mean over their tokens.

    Args:
        balance: Right over wrong rollouts that are kept; the surplus is drawn by the run's seed and step. 0 keeps only
            the wrong ones of a mixed group, infinity only the right ones. Null: all are kept.
        balance_scope: Within each prompt's rollouts (the paper's scripts), or within the batch.
        calibration: `shift`: the equation. `mask`: the right rollouts of lowest and the wrong ones of highest mean
            log-ratio get advantage 0, until the gap is the margin. Null: the plain log-ratio.
        margin: m, nats. Large margins make of it REINFORCE with a reward of +1 and -1.
        margin_gap: `mean`, or `minmax`: of the lowest right and the highest wrong (the paper's equations).
        margin_scope: As `balance_scope`.
        margin_direction: `both` (Spread), or the whole shift on the right ones, up (Lift), or on the wrong ones, down.
        margin_retained: Of `mask`: share of a group that stays at least.
        margin_over: Whose log-ratios are compared: those of all rollouts, as in the code, or of the balanced ones.
        gap_limit: Nats, against the student as it is.
        clip_low: PPO's epsilon below 1.
        clip_high: PPO's epsilon above 1.
        success_threshold: Reward from which a rollout is right.
        reduction: `rollouts`: see above. `tokens`: all tokens that are kept count alike.
        difficulty: `balanced`: prompts of which the first student solves some answers of 8 are drawn more often where
            such are rare; measured before the first step. The paper does so, but gives no numbers: off by default.
        samples: Rollouts per prompt.
        temperature: Of sampling and of both distributions.

    Departure from the released code: it zeroes what is left out but divides by the whole batch. A token ruled out
    is 100 nats in g. Left out: teachers by domain, images. The odds of `difficulty` are reconstructed. Defaults are
    those of the main experiments on text, not of the code (scope of the batch, margin 0, right ones up).
    """
    kept = None if balance is None else parts.balance(balance, scope=balance_scope, threshold=success_threshold)
    order = None if difficulty is None else EasyToHard(difficulty)
    by_rollout = reduction == "rollouts"
    near = parts.within_reach(gap_limit)
    advantage = parts.calibrated_log_ratio(
        calibration,
        margin=margin,
        gap=margin_gap,
        scope=margin_scope,
        direction=margin_direction,
        retained=margin_retained,
        over=kept if margin_over == "kept" else None,
        threshold=success_threshold,
    )
    by, over_tokens = (None, tokens()) if kept is None else ("balance", weighted("balance"))
    weight = near if kept is None else both(near, kept)
    curves = [] if calibration is None else ["margin.return", f"margin.{'shift' if calibration == 'shift' else 'kept'}"]
    score = score_function(advantage, clip=(clip_low, clip_high))
    off = {"balance": None, "gap_limit": math.inf, "clip_high": 0.2, "reduction": "tokens"}
    adam = {"beta2": 0.98, "weight_decay": 0.1}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, order=order),
        temperature=temperature,
        terms=(Term("reverse", score, weight=weight, denominator=rollout_means(by) if by_rollout else over_tokens),),
        limits=(
            Limit({**off, "calibration": None}, equals=("opd", {"clip": 0.2})),
            Limit({**off, "margin": -math.inf}, equals=("opd", {"clip": 0.2})),
        ),
        recipe={
            "rollout": {"prompts": 64, "max_new_tokens": 16384, "max_prompt_tokens": 4096},
            "optimizer": {"learning_rate": 1e-6, "schedule": "constant", "warmup": 5, **adam},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("within_reach", near),
            *(Watch(name.replace(".", "_"), stored_quantity(name)) for name in curves),
            *([] if kept is None else [Watch("kept_fraction", kept)]),
            Watch("clip_fraction", score.clipped("reverse")),
        ),
    )
