"""ResOPD: the gradient of the whole reverse KL from a teacher's top-k and the sampled token."""

from retort.advantages import log_ratio
from retort.divergences import tail_residual, topk_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import (
    gradient_variance,
    residual_variance,
    sampled_reverse_kl,
    sampled_tail,
    student_entropy,
    teacher_entropy,
    teacher_top_mass,
)
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="ResOPD: Tail Residualization for Sparse On-Policy Distillation",
        authors="Yang, Penghui and Xing, Long and Dai, Xuanlang and Liu, Ziyu and Chen, Kai and Zang, Yuhang",
        year=2026,
        arxiv="2610.04882",
        url="https://github.com/InternLM/ResOPD",
    ),
    status="faithful",
)
def resopd(*, top_k: int = 4, samples: int = 1, temperature: float = 1.0) -> Method:
    r"""Reverse KL on the teacher's top-k and one bucket, plus what that leaves out, from the sampled token: unbiased.

    .. math:: \sum_{v \in S} p_S(v)\,r_v + \tau_p\,r_B + [y \notin S]\,(r_y - r_B), \quad
              r_v = \log\frac{p_S(v)}{p_T(v)}, \quad r_B = \log\frac{\tau_p}{\tau_q}

    S is the teacher's top-k, y the sampled token, and :math:`\tau_p, \tau_q` are what student and teacher leave to all
    other ids. The first two parts (term `bucket`) are exact and differentiated as they are: the reverse KL of
    `topk_kl` with `support=teacher`, `tail=bucket`. The gradient of the last part (term `residual`) is that of a
    sampled policy gradient in the tail, less what the bucket already counts: :math:`[y \notin S]\,(r_y \nabla\log
    p_S(y) - r_B \nabla\log\tau_p)`. The mean over y is the reverse KL over the whole vocabulary, in value and in
    gradient. Nats; both terms are divided by all counted tokens.

    It costs a teacher k + 1 numbers per token. Only the tail is sampled, so the variance is usually below that of
    `opd`, but not always: between random distributions it may be several times as large. The curves
    `gradient_variance` and `gradient_variance_plain` (of `opd`) are exact, of one step in logit space, at every tenth
    batch, where the teacher gives its whole distribution. y must be drawn from the student's whole distribution, so a
    plan with top-p below 1, another temperature, old rollouts or a teacher's is refused.

    Args:
        top_k: k. 0 is `opd`; at or above the vocabulary it is the exact reverse KL, without a residual.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    The authors report that no order of the variances holds in general, and reductions by 52 to 75 % on five pairs. As
    for them there is no clamp, no reward and one update per batch. If there are several, the residual is weighed by the
    importance ratio, and stays unbiased.

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]] * 2).log(), tensor([[0.6, 0.1, 0.3]] * 2).log()
        >>> method, given = retort.load("resopd", top_k=1), {"tokens": tensor([0, 1])}
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["residual"].value  # the second token is in the tail: ln(0.3 / 0.1) - ln(0.5 / 0.4)
        tensor([0.0000, 0.8755])
    """
    if top_k < 0:
        raise UserError(f"method.top_k must not be negative, it is {top_k}; 0 is `opd`")
    curves = (
        Watch("reverse_kl", sampled_reverse_kl()),
        Watch("student_entropy", student_entropy()),
        Watch("teacher_entropy", teacher_entropy()),
        Watch("gradient_variance_plain", gradient_variance(), every=10),
    )
    if top_k == 0:
        terms = (Term("residual", score_function(log_ratio())),)
    else:
        bucket = topk_kl("reverse", top_k, "teacher", "bucket")
        terms = (Term("bucket", pathwise(bucket)), Term("residual", pathwise(tail_residual(top_k))))
        curves = (
            *curves,
            Watch("gradient_variance", residual_variance(top_k), every=10),
            Watch("teacher_own_topk_mass", teacher_top_mass(top_k)),
            Watch("sampled_tail", sampled_tail(top_k)),
            Watch("bucket_reverse_kl", bucket),
        )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=terms,
        limits=(
            Limit({"top_k": 0}, equals=("opd", {})),
            Limit({"top_k": 10**9}, equals=("gkd", {"divergence": "reverse_kl"})),
        ),
        recipe={
            "rollout": {"max_new_tokens": 32768},
            "optimizer": {"updates": 1},
        },
        watch=curves,
    )
