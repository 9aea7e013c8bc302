"""Uni-OPD: the sampled reverse KL on balanced rollouts, by a teacher that is made to rank right above wrong."""

import math
from typing import Literal

from retort.core.reduce import rollout_means, tokens, weighted
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.methods._uni_opd import Balance, Clip, Margin
from retort.quantities import sampled_reverse_kl, stored_quantity, student_entropy
from retort.rollout.plan import EasyToHard, RolloutPlan
from retort.weights import both
from retort.weights import calibration as parts

__all__ = ["Balance", "Clip", "Margin", "uni_opd"]


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
    balance: Balance = Balance(),
    calibration: Literal["shift", "mask"] | None = "shift",
    margin: Margin = Margin(),
    gap_limit: Unbounded = 10.0,
    clip: Clip = Clip(),
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
        balance: Right and wrong rollouts that are kept.
        calibration: `shift`: the equation. `mask`: the right rollouts of lowest and the wrong ones of highest mean
            log-ratio get advantage 0, until the gap is the margin. Null: the plain log-ratio.
        margin: m, and the measure of g.
        gap_limit: Nats, against the student as it is.
        clip: PPO's epsilons.
        success_threshold: Reward from which a rollout is right.
        reduction: `rollouts`: see above. `tokens`: all tokens that are kept count alike.
        difficulty: `balanced`: prompts of which the first student solves some of 8 completions are drawn more often
            where such are rare; measured before the first step. The paper does so, but gives no numbers: off by
            default.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departure from the released code: it zeroes what is left out but divides by the whole batch. A token ruled out
    is 100 nats in g. Teachers by domain are settings of the run (`teachers`). The odds of `difficulty` are
    reconstructed. Defaults are those of the main experiments on text, not of the code (scope of the batch, margin 0,
    right ones up). With images, which teachers see as the student does, the paper has `margin_direction=correct_up` and
    `margin=0`.

    Example:
        >>> logits, given = tensor([[0.5, 0.5]] * 2).log(), {"rollouts": tensor([0, 1]), "groups": tensor([0, 0])}
        >>> given |= {"tokens": tensor([0, 0]), "rewards": tensor([1.0, 0.0])}
        >>> losses = token_losses("uni_opd", student_logits=logits, teacher_logits=logits, **given)
        >>> losses.terms["reverse"].value  # log-ratios are 0, and half of the margin of 0.4 goes to either side
        tensor([-0.2000,  0.2000])
    """
    kept = None
    if balance.ratio is not None:
        kept = parts.balance(balance.ratio, scope=balance.scope, threshold=success_threshold)
    order = None if difficulty is None else EasyToHard(difficulty)
    by_rollout = reduction == "rollouts"
    near = parts.within_reach(gap_limit)
    advantage = parts.calibrated_log_ratio(
        calibration,
        margin=margin.size,
        gap=margin.gap,
        scope=margin.scope,
        direction=margin.direction,
        retained=margin.retained,
        over=kept if margin.over == "kept" else None,
        threshold=success_threshold,
    )
    by, over_tokens = (None, tokens()) if kept is None else ("balance", weighted("balance"))
    weight = near if kept is None else both(near, kept)
    curves = [] if calibration is None else ["margin.return", f"margin.{'shift' if calibration == 'shift' else 'kept'}"]
    score = score_function(advantage, clip=(clip.low, clip.high))
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
