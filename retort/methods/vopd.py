"""vOPD: OPD with the value of the step as a control variate."""

from retort.advantages import log_ratio
from retort.errors import UserError
from retort.estimators import reverse_kl_value, score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import gradient_variance, sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="KL for a KL: On-Policy Distillation with Control Variate Baseline",
        authors="Oh, Minjae and Song, Sangjun and Choi, Gyubin and Choi, Yunho and Jo, Yohan",
        year=2026,
        arxiv="2605.07865",
    ),
    status="faithful",
)
def vopd(*, top_k: int | None = 20, baseline_coef: float = 1.0, samples: int = 1, temperature: float = 1.0) -> Method:
    r"""Sampled reverse KL with the closed-form value of the step subtracted: less variance, the same expected gradient.

    .. math:: A_t = \log p_T(y_t) - \log p_{old}(y_t) - V_t, \quad V_t = -D_{KL}(p_S \Vert p_T)

    With `top_k`, both distributions in V are renormalised on the student's k most likely ids; the log-ratio always uses
    the whole vocabulary. The baseline is detached and does not depend on the generated token, so any k leaves the
    gradient unbiased (it must: the sampling here is never truncated). Lower variance is the rule, not a law: see the
    paper's Eq. 23.

    From a teacher with another tokenizer the log-ratio is that of a unit, as in `opd`, and V compares both models where
    it begins, renormalised on the student's k most likely shared ids (all of them without `top_k`). It knows nothing of
    ids that are not shared, so it takes off less variance there; like any V of the prefix, it adds no bias.

    Args:
        top_k: k of the baseline (Eqs. 14-15; paper 20, released configuration 100), at least 2; null for the whole
            vocabulary (Eqs. 9-10), for which the released code has 0.
        baseline_coef: 1 in the paper; 0 is plain OPD.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures from the paper: where one batch feeds several updates, advantage and baseline are those of the student
    before the first, with the importance ratio in front (the paper makes one update per batch). In `token_losses` only
    the log-ratio uses `old_logp`; the baseline is that of the student as it is given. The curves `gradient_variance`
    and `gradient_variance_plain` (with and without baseline, every tenth batch) are exact but of one step in logit
    space; of the two measures of the released code, `adam_variance` is the proxy, and the variance of whole gradients
    is logged for any method with `record.gradient_variance_every`.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 2).log(), tensor([[0.8, 0.2]] * 2).log()
        >>> losses = token_losses("vopd", student_logits=student, teacher_logits=teacher, tokens=tensor([0, 1]))
        >>> losses.terms["reverse"].value  # `opd` has -0.4700 and 0.9163; V, the mean under the student, is taken off
        tensor([-0.6931,  0.6931])
    """
    if top_k is not None and top_k < 2:
        raise UserError(
            f"method.top_k = {top_k}: on fewer than 2 ids the baseline is 0, which is `opd`; set it to 2 or more, or "
            "to null for the whole vocabulary"
        )
    baseline = reverse_kl_value(top_k)
    score = score_function(log_ratio(), baseline=baseline, baseline_coef=baseline_coef)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("reverse", score),),
        limits=(
            Limit({"baseline_coef": 0.0}, equals=("opd", {})),
            Limit({"top_k": 10**9}, equals=("vopd", {"top_k": None})),
        ),
        recipe={
            "rollout": {"prompts": 64, "max_new_tokens": 2048, "max_prompt_tokens": 1024},
            "optimizer": {"learning_rate": 1e-5, "schedule": "cosine", "updates": 1, "weight_decay": 0.0},
            "eval": {"samples": 8, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 4096},
        },
        adam_variance=True,
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("baseline", baseline),
            Watch("gradient_variance", gradient_variance(baseline, coef=baseline_coef), every=10),
            Watch("gradient_variance_plain", gradient_variance(), every=10),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
