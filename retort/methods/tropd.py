"""TrOPD: distillation inside of a trust region, forward KL on what falls out of it."""

from retort.advantages import log_ratio
from retort.divergences import forward_kl, teacher_top
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy, teacher_top_mass
from retort.rollout.plan import RolloutPlan
from retort.weights import acceptance_probability, accepted


@method(
    paper=Paper(
        title="Trust Region On-Policy Distillation",
        authors="Xing, Xingrun and Wang, Haoqing and Gao, Boyan and Li, Ziheng and Tang, Yehui",
        year=2026,
        arxiv="2606.01249",
    ),
    status="partial",
)
def tropd(
    *,
    top_k: int = 64,
    forward_coef: float = 1.0,
    renormalise: bool = False,
    leniency: Unbounded = 1.0,
    samples: int = 4,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL on tokens that the teacher accepts by a draw, forward KL on its top-k at all others.

    .. math:: \ell_t = -M_t A_t + \alpha\,(1 - M_t) \sum_{v \in TopK(p_T)} p_T(v) \log\frac{p_T(v)}{p_S(v)}, \quad
              M_t \sim \mathrm{Bernoulli}\big(\min(c\,p_T(y_t) / p_{old}(y_t), 1)\big)

    :math:`A_t = \log p_T(y_t) - \log p_{old}(y_t)`, as a policy gradient (term `reverse`); the other term, `forward`,
    is differentiated. M is how speculative decoding accepts a token, drawn once for a batch, from a stream of the run's
    seed: a resumed run draws the same. Nats; both terms are divided by all counted tokens. The mean of M is one minus
    the total variation of student and teacher: the curve `accepted_fraction`, and with less noise
    `acceptance_probability`, measure it for free.

    Args:
        top_k: k of the forward term; at or above the vocabulary it means all of it.
        forward_coef: alpha; 0 leaves refused tokens out (the paper's `mask`).
        renormalise: Whether the teacher is renormalised on its top-k; the formula shows no sign of it.
        leniency: c; 1 is the paper's. Infinity accepts all, which is `opd`; 0 nothing, which is a forward KL.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Left out is the paper's third part, a small weight (0.001, falling to 0) of the likelihood of prefixes that the
    teacher wrote and the student continues. In the paper (mean of three benchmarks) plain OPD has 46.8, leaving refused
    tokens out 47.7, the forward term 49.0, that part 49.9.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 3).log(), tensor([[0.8, 0.2]] * 3).log()
        >>> losses = token_losses("tropd", student_logits=student, teacher_logits=teacher, tokens=tensor([0, 1, 1]))
        >>> losses.terms["reverse"].weight  # ratios of 1.6, 0.4 and 0.4: always accepted, accepted by its draw, refused
        tensor([1., 1., 0.])
    """
    forward = forward_kl(teacher_top(top_k, renormalised=renormalise))
    inside, outside = accepted(leniency), accepted(leniency, refused=True)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(
            Term("reverse", score_function(log_ratio()), weight=inside),
            Term("forward", pathwise(forward), weight=outside, coef=forward_coef),
        ),
        limits=(
            Limit({"leniency": float("inf")}, equals=("opd", {})),
            Limit({"leniency": 0.0, "top_k": 10**9}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"forward_coef": 0.0, "top_k": 3}, equals=("tropd", {"forward_coef": 0.0})),
        ),
        recipe={
            "rollout": {"prompts": 128, "max_new_tokens": 8096},
            "optimizer": {"learning_rate": 5e-6, "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("accepted_fraction", inside),
            Watch("acceptance_probability", acceptance_probability()),
            Watch("forward_kl_refused", forward, where=outside),
            Watch("teacher_own_topk_mass", teacher_top_mass(top_k)),
        ),
    )
