"""Position-weighted on-policy self-distillation: later tokens count for more."""

from typing import Literal

from retort.core.reduce import rollout_means, tokens
from retort.divergences import clipped, clipped_mass, forward_kl, teacher_top
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.methods._itself import Follow, Shown, Whose, itself
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights import late


@method(
    paper=Paper(
        title="When Are Teacher Tokens Reliable? Position-Weighted On-Policy Self-Distillation for Reasoning",
        authors="Liu, Xiaogeng and Wang, Xinyan and Ma, Yingzi and Zhang, Yechao and Xiao, Chaowei",
        year=2026,
        arxiv="2605.21606",
    ),
    status="faithful",
)
def pw_opsd(
    *,
    min_weight: float = 0.25,
    midpoint: float = 0.3,
    width: float = 0.1,
    reduction: Literal["rollouts", "tokens"] = "rollouts",
    teacher_weight: float = 0.0,
    kl_clip: Unbounded | None = 0.05,
    top_k: int | None = None,
    teacher: Whose = "self",
    weights: Follow = "frozen",
    update_rate: float = 0.001,
    shows: Shown = ("solution",),
    samples: int = 1,
    temperature: float = 1.1,
    top_p: float = 0.95,
) -> Method:
    r"""The clipped forward KL of `opsd`, with a weight that rises along each completion as a sigmoid of the position.

    .. math:: L = \frac1B \sum_b \frac1{T_b} \sum_t a_t \sum_v \min(p_T(v) [\log p_T(v) - \log p_S(v)], \kappa), \quad
              a_t = a_{min} + (1 - a_{min})\,\sigma\Big(\frac{u_t - \tau}{s}\Big), \quad u_t = \frac{t - 0.5}{T_b}

    T_b is the length of the completion. The loss is in nats; each completion counts the same (OPSD: each token), empty
    ones do not count, and the weights are not normalised: with the defaults their mean is 0.771. See `opsd` for what
    the clip does.

    Args:
        min_weight: a_min. With `midpoint` and `width` this is the "moderate" schedule of all the paper's models; the
            numbers of its "aggressive" one are not in the released code.
        midpoint: tau, relative position.
        width: s, relative positions; the smaller, the more it is a step.
        reduction: `rollouts`: the mean over completions of the mean over tokens. `tokens`: the paper's ablation, all
            tokens alike.
        teacher_weight: See `opsd`, as all that follow.
        kl_clip: kappa, nats.
        top_k: The teacher's most likely ids that both sides are renormalised on.
        teacher: The student `self`, or an `outside` one.
        weights: Weights of the teacher.
        update_rate: Update rate of `ema`.
        shows: Columns of the data that the teacher sees.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.
        top_p: Top-p of sampling.

    The paper's finding is about completions cut at 1024 tokens and a teacher with the solution; for stronger outside
    teachers others find later tokens *less* reliable. `retort trust` makes its measurement on a run of one's own.

    Departures: sampling is not cut to 20 ids; student and teacher get the same chat template (the paper's teacher
    thinks, its student does not). The paper trains an adapter (`lora.rank` 64), which the recipe leaves to you.

    Example:
        >>> logits = tensor([[0.5, 0.5]] * 4).log()
        >>> losses = token_losses("pw_opsd", student_logits=logits, teacher_logits=logits, tokens=tensor([0, 0, 0, 0]))
        >>> losses.terms["divergence"].weight  # 0.25 + 0.75 sigmoid((u - 0.3) / 0.1) at u = 1/8, 3/8, 5/8, 7/8
        tensor([0.3610, 0.7594, 0.9720, 0.9976])
    """
    if top_k == 1:
        raise UserError("method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt")
    support = None if top_k is None else teacher_top(top_k)
    chosen = clipped(kl_clip, teacher_weight, support)
    weight = late(min_weight, midpoint, width)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views={"teacher": itself(teacher, shows, weights, update_rate)},
        temperature=temperature,
        terms=(
            Term(
                "divergence",
                pathwise(chosen),
                weight=weight,
                denominator=rollout_means() if reduction == "rollouts" else tokens(),
            ),
        ),
        limits=(
            Limit({"min_weight": 1.0, "reduction": "tokens"}, equals=("opsd", {})),
            Limit({"min_weight": 0.0, "midpoint": -1e6, "reduction": "tokens"}, equals=("opsd", {})),
            Limit({"top_k": 10**9}, equals=("pw_opsd", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 1024},
            "optimizer": {"learning_rate": 5e-6, "updates": 1, "grad_clip": 0.1},
            "eval": {"samples": 12, "temperature": 1.0, "top_p": 0.95},
        },
        watch=(
            Watch("position_weight", weight, by_position=True),
            Watch("forward_kl", forward_kl(), by_position=True),
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("clipped_mass", clipped_mass(kl_clip, teacher_weight, support)),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
