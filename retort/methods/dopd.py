"""DOPD: two teachers with a hint, one of them the student itself, divide the tokens between them."""

from functools import partial
from typing import Literal

from retort.core.reduce import rollout_means, tokens
from retort.divergences import jsd, topk_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.image_views import privileged_images
from retort.teachers.moving import live
from retort.teachers.views import privileged
from retort.weights.privilege import AGREED, STUDENT, TEACHER, VAGUE, Regimes

_ITSELF = "privileged_student"


@method(
    paper=Paper(
        title="DOPD: Dual On-policy Distillation",
        authors="Yu, Xinlei and Li, Gen and Si, Qingyi and Zhang, Guibin and Xu, Yuqi and others",
        year=2026,
        arxiv="2606.30626",
    ),
    status="partial",
)
def dopd(
    *,
    light_coef: float = 0.6,
    weak_coef: float = 0.3,
    top_k: int = 128,
    support: Literal["mixed", "student"] = "mixed",
    tail: Literal["bucket", "renormalised"] = "bucket",
    trim: float = 0.05,
    routing: Literal["regimes", "none"] = "regimes",
    hint: Literal["hint", "solution", "answer", "demonstration", "images"] = "hint",
    reduction: Literal["rollouts", "tokens"] = "rollouts",
    samples: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Method:
    r"""Divergences to a teacher and to the student itself, both shown a hint; every token gets one of them.

    .. math:: \ell_t = \begin{cases}
              JS(s, T) & A \ge \bar A,\ q_T \ge q_S \\
              \beta_l\,D_K(s \Vert S) & A \ge \bar A,\ q_T < q_S \\
              \beta_l\,D_K(s \Vert T) & A < \bar A,\ q_S + q_T \ge \bar q_S + \bar q_T \\
              \beta_w\,D_K(s \Vert S) & \text{otherwise} \end{cases}
              \qquad A = |\log q_T - \log q_S|

    s is the student; T the teacher and S the live student, both shown the hint. q are their probabilities of the
    generated token, and barred values are means over the whole batch without outliers. JS is over the whole vocabulary
    with weight 1/2, D_K the reverse KL on a top-k, both in nats. The loss is the mean over rollouts of the mean over
    their tokens. No gradient passes through S, T or the choice.

    Args:
        light_coef: beta_l, dimensionless.
        weak_coef: beta_w, dimensionless.
        top_k: K.
        support: Support of D_K. `mixed`: T's top-k against T, the learning student's against S. `student`: the learning
            student's against both. The paper does not say; reconstructed.
        tail: Treatment of the other ids: one bucket, or left out. Reconstructed.
        trim: Share of the largest values that each mean leaves out. The paper drops the top 5% and then normalises in
            the batch in a way that it does not tell; no further normalisation is a reconstruction.
        routing: `none`: the Jensen-Shannon divergence to the teacher with the hint at every token.
        hint: The column that both are shown; the paper found whole solutions worse than no hint. `images`: the row's
            images for a teacher alone (`teacher_images`); the paper has boxes with labels in words, which `hint` holds.
        reduction: `tokens`: all tokens count alike.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions; the paper does not say.
        top_p: Top-p of sampling.

    Where all gaps are equal none is below their mean: with a teacher that is the student, all tokens get JS. A rollout
    without a hint is left out of the loss.

    Example:
        >>> student, teacher, itself = (tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (0.5, 0.9, 0.6))
        >>> given = {"tokens": tensor([0, 0]), "extra_views": {"privileged_student": itself}}
        >>> method = retort.load("dopd", trim=0.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["teacher_firm"].weight  # A is ln 1.5, then 0: only the first is above the mean
        tensor([1., 0.])
    """
    if weak_coef < 0 or light_coef < 0:
        raise UserError(f"dopd: light_coef and weak_coef must not be negative ({light_coef}, {weak_coef})")
    over = rollout_means() if reduction == "rollouts" else tokens()
    firm = pathwise(jsd(0.5))
    by_teacher = pathwise(topk_kl("reverse", top_k, "teacher" if support == "mixed" else "student", tail))
    by_itself = pathwise(topk_kl("reverse", top_k, "student", tail))
    shown = privileged_images if hint == "images" else partial(privileged, hint)
    regime = Regimes(trim=trim, student=_ITSELF)
    agreed, vague, teacher, itself = (regime.weight(number) for number in (AGREED, VAGUE, TEACHER, STUDENT))
    adam = {"learning_rate": 5e-6, "schedule": "cosine", "updates": 1}
    if routing == "none":
        terms, views, curves = (Term("teacher_firm", firm, denominator=over),), {}, ()
    else:
        terms = (
            Term("teacher_firm", firm, weight=teacher, denominator=over),
            Term("teacher_light", by_teacher, weight=agreed, coef=light_coef, denominator=over),
            Term("student_weak", by_itself, _ITSELF, weight=vague, coef=weak_coef, denominator=over),
            Term("student_light", by_itself, _ITSELF, weight=itself, coef=light_coef, denominator=over),
        )
        views = {_ITSELF: shown(model="student", weights=live())}
        curves = (
            *(Watch(f"{term.name}_fraction", term.weight, against=term.against) for term in terms if term.weight),
            Watch("privileged_gap", regime.gap()),
        )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        temperature=temperature,
        views={"teacher": shown(model="teacher"), **views},
        terms=terms,
        limits=(Limit({"routing": "none", "reduction": "tokens"}, equals=("gkd", {"temperature": 1.0})),),
        recipe={"rollout": {"prompts": 128}, "optimizer": adam, "steps": 200},
        watch=(Watch("student_entropy", student_entropy()), *curves),
    )
