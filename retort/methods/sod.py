"""SOD: less weight on the turns after a bad tool call, and the outcome's reward beside the teacher."""

from typing import Literal

from retort.advantages import Summand, advantage_sum, group_advantage, log_ratio
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights.turns import TurnGaps


@method(
    paper=Paper(
        title="SOD: Step-wise On-policy Distillation for Small Language Model Agents",
        authors="Zhong, Qiyong and Zheng, Mao and Song, Mingyang and Lin, Xin and Sun, Jie and Zhao, Yiqi and Wang, "
        "Xiaodi and Jiang, Houcheng and Wang, Xiang and Fang, Junfeng",
        year=2026,
        arxiv="2605.07725",
    ),
    status="faithful",
)
def sod(
    *,
    coef: float = 1.0,
    outcome_coef: float = 1.0,
    weighting: Literal["turns", "none"] = "turns",
    cap: Unbounded = 0.2,
    epsilon: float = 1e-6,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    samples: int = 16,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL with a weight by turn, which falls where the models move apart, plus the group's reward.

    .. math:: A_t = A^{GRPO} + c\,a_{k(t)}\,[\log p_T(y_t) - \log p_{old}(y_t)], \quad
              a_k = \min\Big(\frac{d_1 + \epsilon}{d_k + \epsilon},\ 1 + \delta\Big)

    in PPO's clipped loss. d is the mean of :math:`|\log p_T - \log p_{old}|` over the tokens of a turn, nats; a turn is
    a run of the student's tokens between two replies of the environment. After a bad call the replies are far from what
    the teacher knows, its token signal is noise, and d grows. The first turn always has weight 1. The paper writes a
    product of ratios of neighbouring turns, which telescopes; its cap is outside of the product. The loss is divided by
    all counted tokens.

    Args:
        coef: c, of the teacher's term, dimensionless; 0 leaves it out.
        outcome_coef: Of the reward's term; 0 leaves it out, and then no rewards are needed.
        weighting: `none`: a is 1.
        cap: delta (0.2 in the run script and the paper, 0.5 in the released dataclass); .inf for no cap.
        epsilon: Added to both d, nats.
        clip_low: PPO's epsilon below 1; null for no clip, then on neither side.
        clip_high: PPO's epsilon above 1.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    The released code's form of the teacher's term is taken, an advantage; the paper's equation 9 differentiates the
    sampled sum, whose gradient does not depend on the teacher. Departures: rewards are the environment's, without the
    released bonus for the use of tools and the penalty for length. Everything is relative to the first turn: a short
    and sure one makes all others light.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 3).log(), tensor([[0.4, 0.6], [0.1, 0.9], [0.45, 0.55]]).log()
        >>> given = {"tokens": tensor([0, 0, 0]), "turns": tensor([0, 1, 2])}
        >>> method = retort.load("sod", outcome_coef=0.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["distillation"].weight  # ln(5/4) / ln 5, and 2.1 capped
        tensor([1.0000, 0.1386, 1.2000])
    """
    if (clip_low is None) != (clip_high is None):
        raise UserError("method.clip_low and method.clip_high: give both, or null for both")
    if coef == outcome_coef == 0:
        raise UserError("method.coef and method.outcome_coef are both 0, so nothing would be learnt")
    turns = TurnGaps()
    weight = turns.relative_to_first(cap, epsilon) if weighting == "turns" else None
    clip = None if clip_low is None or clip_high is None else (clip_low, clip_high)
    taught, graded = Summand(log_ratio(), coef, weight), Summand(group_advantage(), outcome_coef)
    summands = [summand for summand in (taught, graded) if summand.coef != 0]
    both = advantage_sum(*summands) if len(summands) > 1 else None
    terms = tuple(
        Term(name, score_function(summand.advantage, clip=clip, clip_by=both), weight=summand.weight, coef=summand.coef)
        for name, summand in (("distillation", taught), ("outcome", graded))
        if summand.coef != 0
    )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=terms,
        limits=(
            Limit({"weighting": "none", "outcome_coef": 0.0, "clip_low": None, "clip_high": None}, equals=("opd", {})),
            Limit({"coef": 0.0}, equals=("rlsd", {"share": 0.0})),
        ),
        recipe={
            "rollout": {"prompts": 64, "max_prompt_tokens": 2560, "max_new_tokens": 20480},
            "optimizer": {"learning_rate": 1e-6, "updates": 4},
            "eval": {"samples": 32, "temperature": 1.0, "top_p": 0.6},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("turn_gap", turns.gap()),
            *((Watch("turn_weight", weight),) if weight is not None else ()),
            Watch("clip_fraction", terms[0].estimator.clipped(terms[0].name)),  # type: ignore[attr-defined]
        ),
    )
