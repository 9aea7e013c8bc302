"""Entropy-aware OPD: reverse KL everywhere, plus forward KL where the teacher is uncertain."""

from typing import Literal

from retort.advantages import log_ratio
from retort.divergences import forward_kl, teacher_top
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import (
    sampled_reverse_kl,
    student_entropy,
    teacher_entropy,
    teacher_entropy_bound,
    teacher_top_mass,
)
from retort.rollout.plan import RolloutPlan
from retort.weights import above


@method(
    paper=Paper(
        title="Entropy-Aware On-Policy Distillation of Language Models",
        authors="Jin, Woogyeol and Min, Taywon and Yang, Yongjin and Kadhe, Swanand Ravindra and Zhou, Yi and Wei, "
        "Dennis and Baracaldo, Nathalie and Lee, Kimin",
        year=2026,
        arxiv="2603.07079",
        venue="ICML 2026, PMLR v306",
    ),
    status="faithful",
)
def eopd(
    *,
    entropy_threshold: Unbounded = 0.8,
    top_k: int = 16,
    forward_coef: float = 1.0,
    clip: float | None = 0.2,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    entropy_bound: Literal["refuse", "use"] = "refuse",
) -> Method:
    r"""Sampled reverse KL on every token, plus forward KL on the teacher's top-k where the teacher is uncertain.

    .. math:: \ell_t = \max(-A_t \rho_t, -A_t\,\mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon))
              + \alpha\,[H(p_T) > \tau]\,D_{KL}(\tilde p_T \Vert p_S)

    with :math:`A_t = \log p_T(y_t) - \log p_{old}(y_t)` fixed for the batch, :math:`\tilde p_T` the teacher
    renormalised on its own top-k, and :math:`p_S` the student's softmax over the whole vocabulary. Both terms are
    divided by *all* counted tokens: the reverse term is never switched off, and the forward one is not divided by the
    number of gated tokens. At :math:`p_S = p_T` the forward term is :math:`-\ln p_T(\text{top-k})`, not 0: its minimum
    is the truncated teacher.

    Args:
        entropy_threshold: tau, nats, against the entropy of the teacher's whole distribution; strictly greater opens.
        top_k: k, candidates of the teacher in the forward term; at or above the vocabulary it means all of it.
        forward_coef: alpha, dimensionless.
        clip: epsilon of PPO, both sides; null for none. The paper names PPO without a value; this is its code's
            default.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.
        top_p: Top-p of sampling (the paper: 1, for Llama 0.8).
        entropy_bound: What to do with a teacher that gives a top-k, from which only a lower bound of its entropy
            follows (docs/endpoints.md): `refuse` it, or `use` the bound in the gate. The gate then never opens wrongly,
            but it stays closed at tokens whose entropy is above tau and whose bound is not; the curve
            `teacher_entropy_bound` says that it is used.

    Departures from the released code: the top-k of step t is that of step t (the code takes the one after it); the gate
    is the paper's `>` (code: `>=`); the denominator counts the whole optimizer batch (code: the micro-batch); where the
    two models stop on different tokens, the teacher's candidates are translated too, not only the generated token.

    Example:
        >>> student, teacher = tensor([[1.0, 1.0, 1.0]] * 2), tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3]]).log()
        >>> losses = token_losses("eopd", student_logits=student, teacher_logits=teacher, tokens=tensor([0, 0]))
        >>> losses.terms["forward"].weight  # entropies of 0.11 and ln 3 = 1.10 nats: one is above 0.8
        tensor([0., 1.])
    """
    uncertain = above(teacher_entropy(or_bound=entropy_bound == "use"), entropy_threshold)
    reverse = score_function(log_ratio(), clip=clip)
    forward = forward_kl(teacher_top(top_k))
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        temperature=temperature,
        terms=(
            Term("reverse", reverse),
            Term("forward", pathwise(forward), weight=uncertain, coef=forward_coef),
        ),
        limits=(
            Limit({"entropy_threshold": float("inf")}, equals=("opd", {"clip": 0.2})),
            Limit({"forward_coef": 0.0}, equals=("opd", {"clip": 0.2})),
            Limit({"top_k": 10**9}, equals=("eopd", {"top_k": 10**6})),
        ),
        recipe={
            "rollout": {"prompts": 128, "max_new_tokens": 4096, "max_prompt_tokens": 1024},
            "optimizer": {"learning_rate": 3e-6, "schedule": "cosine", "updates": 4, "grad_clip": 1.0},
            "eval": {"samples": 8, "top_p": 0.8, "max_new_tokens": 8192},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            *([Watch("teacher_entropy_bound", teacher_entropy_bound())] if entropy_bound == "use" else []),
            Watch("gate_open_fraction", uncertain),
            Watch("student_entropy_gated", student_entropy(), where=uncertain),
            Watch("forward_kl_gated", forward, where=uncertain),
            Watch("clip_fraction", reverse.clipped("reverse")),
            Watch(
                "teacher_topk_mass",
                teacher_top_mass(top_k),
                where=uncertain,
                alarm_below=0.9,
                advice=f"the teacher's top-{top_k} holds less than 0.9 of its probability where it is uncertain: the "
                "truncated forward KL then fights the reverse KL; raise method.top_k",
            ),
        ),
    )
