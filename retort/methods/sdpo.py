"""SDPO: the student teaches itself, shown a sibling that succeeded or feedback."""

from typing import Literal

from retort.advantages import log_ratio
from retort.advantages.outcome import group_advantage
from retort.divergences import Tail
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.methods._siblings import Teacher, disagreement, ratios, who
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.views import peers


@method(
    paper=Paper(
        title="Reinforcement Learning via Self-Distillation",
        authors="Hübotter, Jonas and others",
        year=2026,
        arxiv="2601.20802",
    ),
    status="faithful",
)
def sdpo(
    *,
    divergence: Literal["jsd", "forward_kl", "reverse_kl", "sampled"] = "jsd",
    teacher_weight: float = 0.5,
    top_k: int | None = 100,
    tail: Tail = "bucket",
    threshold: float = 0.5,
    feedback: Literal["never", "without_success", "always"] = "without_success",
    thoughts: bool = False,
    teacher: Teacher = "ema",
    update_rate: float = 0.05,
    ratio_cap: Unbounded | None = 2.0,
    truncation: Unbounded | None = 2.0,
    distillation_weight: float = 1.0,
    clip: float | None = 0.2,
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""Distillation towards the student itself, shown the first sibling that succeeded or feedback on its attempt.

    .. math:: L = \frac{1}{T} \sum_t \min(c, \rho_t)\; D_w\big(p_S(\cdot | x, y_{<t}),\, p_T(\cdot | x, C, y_{<t})\big)

    on the student's k most likely ids and one bucket with all others; :math:`\rho_t = p_S(y_t) / p_{old}(y_t)`,
    detached. C is never the rollout itself. A rollout for which there is nothing to show is left out, also of the
    number T of tokens; rewards choose what is shown and are not learnt from. The loss is in nats.

    Args:
        divergence: D; `sampled` is the policy gradient on the generated token against the student before the batch,
            whose ratio `ratio_cap` does not bound.
        teacher_weight: w of `jsd`, strictly between 0 and 1. The code's ends are the forward (0) and reverse (1) KL.
        top_k: k; null for the whole vocabulary.
        tail: `bucket`, or both sides `renormalised` on the k ids.
        threshold: Reward from which on a sibling is a success (released experiments; its data class has 1).
        feedback: Condition for showing the verifier's words on the rollout.
        thoughts: Show a sibling's `<think>` block, too.
        teacher: The student's moving average, its `trust_region` (frozen and live logits mixed by `update_rate`), its
            first weights, its `live` ones, or an `outside` model.
        update_rate: u; the average moves by it after each optimizer step (with rich feedback the paper's runs had 0.01,
            `reverse_kl`, `top_k` 20).
        ratio_cap: c; null for no ratio.
        truncation: Cap on the importance ratio of trainer to rollout engine; null for none.
        distillation_weight: Below 1, the loss is mixed with GRPO's on the rewards, which has the rest of the weight.
        clip: PPO's epsilon in that GRPO.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures from the released code: the mean is over the optimizer step's counted tokens, not over micro-batches, in
    which left-out rollouts may count; the words around what is shown are Retort's (`templates`). The mix with GRPO is
    from a port (TRL); a public summary says that the paper blends advantages, which was not checked against its text.

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.8, 0.1, 0.1]]).log()
        >>> method, given = retort.load("sdpo", top_k=1), {"tokens": tensor([0]), "rewards": tensor([0.0])}
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.loss  # of (0.5, the rest 0.5) and (0.8, the rest 0.2), halfway between them (0.65, 0.35)
        tensor(0.0507)
    """
    if not 0.0 < distillation_weight <= 1.0:
        raise UserError(f"method.distillation_weight must lie above 0 and at most at 1, not {distillation_weight:g}")
    if divergence == "sampled":
        loss, weight = score_function(log_ratio()), ratios(None, truncation)
    else:
        loss, weight = disagreement(divergence, teacher_weight, top_k, tail), ratios(ratio_cap, truncation)
    outcome = Term("outcome", score_function(group_advantage(), clip=clip), coef=1.0 - distillation_weight)
    view = peers(threshold=threshold, feedback=feedback, thoughts=thoughts, **who(teacher, update_rate))
    whole = {"ratio_cap": None}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": view},
        temperature=temperature,
        terms=(
            Term("distillation", loss, weight=weight, coef=distillation_weight),
            *([outcome] if distillation_weight < 1.0 else []),
        ),
        limits=(
            Limit({"top_k": None, **whole}, equals=("gkd", {})),
            Limit({"top_k": 10**9, **whole}, equals=("gkd", {})),
            Limit({"divergence": "forward_kl", "top_k": 10**9, **whole}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit(
                {"divergence": "reverse_kl", "top_k": 9, **whole}, equals=("topk_kl", {"top_k": 9, "tail": "bucket"})
            ),
            Limit({"divergence": "sampled"}, equals=("opd", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 8192, "max_prompt_tokens": 2048, "max_view_tokens": 10240},
            "optimizer": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 10, "updates": 1},
            "eval": {"samples": 16},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            *([] if weight is None else [Watch("importance", weight)]),
        ),
    )
