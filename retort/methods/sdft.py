"""Self-distillation fine-tuning: the student with a demonstration in sight is its own teacher."""

from typing import Literal

from retort.core.reduce import weighted
from retort.divergences import clipped, forward_kl, reverse_kl, teacher_top
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._itself import Follow, Shown, Whose, itself
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights import after


@method(
    paper=Paper(
        title="Self-Distillation Enables Continual Learning",
        authors='Shenfeld, Idan and Damani, Mehul and H{\\"u}botter, Jonas and Agrawal, Pulkit',
        year=2026,
        arxiv="2601.19897",
    ),
    status="partial",
)
def sdft(
    *,
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    teacher_weight: float = 0.5,
    top_k: int | None = None,
    skip: int = 3,
    teacher: Whose = "self",
    weights: Follow = "ema",
    update_rate: float = 0.01,
    shows: Shown = ("demonstration",),
    generate_from_teacher: bool = False,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""An exact divergence from the student that sees a demonstration, without the first tokens of each completion.

    .. math:: \ell_t = [t > k]\,D_{KL}(p_T \Vert p_S)

    with p_T the student under the prompt with an example response. The loss is in nats and divided by the tokens that
    are learnt from. Rollouts do not depend on the demonstration, unless `generate_from_teacher` is set. The first
    tokens are left out because a teacher that has seen an example opens as if it spoke about it.

    Args:
        divergence: The paper writes the reverse KL; by its author's word in the code's repository all its results are
            from the forward KL, the default there and here.
        teacher_weight: w of `jsd`, on the teacher; nothing else uses it.
        top_k: Both sides renormalised on the teacher's so many most likely ids; null for the whole vocabulary.
        skip: k, tokens at the start of a completion that are not learnt from.
        teacher: The student `self`; or `outside`, the run's teacher, shown the same; it never moves.
        weights: Weights of the teacher: `ema`, `frozen` or `live`. Reports disagree on what the paper ran; its ablation
            moves results by 2 points at most.
        update_rate: Update rate of `ema`, per optimizer step.
        shows: Columns of the data that the teacher sees; rows without are left out. `demonstration` may be the column
            `response`.
        generate_from_teacher: Whether the student, as it is, writes its completions with the teacher's prompt in sight
            (of rows that have one); they are learnt from as completions of its own prompt.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Partial: written from two ports (TRL, tinker-cookbook) and the author's replies; the released code was not at hand.
    Not here: the cap of 2 on the importance ratio of several updates (TRL). The ports' top-k differ: TRL takes the
    student's ids, tinker a cross-entropy against the renormalised teacher, which is `eopd`'s forward term.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 5).log(), tensor([[0.5, 0.5]] * 4 + [[0.9, 0.1]]).log()
        >>> losses = token_losses("sdft", student_logits=student, teacher_logits=teacher, tokens=tensor([0] * 5))
        >>> losses.loss  # (0 + 0.3681) / 2: the first three tokens are neither learnt from nor counted
        tensor(0.1840)
    """
    if top_k == 1:
        raise UserError("method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt")
    w = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": teacher_weight}[divergence]
    if divergence == "jsd" and not 0 < w < 1:
        raise UserError(f"method.teacher_weight must lie strictly between 0 and 1 for jsd, not {w}")
    chosen = clipped(None, w, None if top_k is None else teacher_top(top_k))
    return Method(
        rollout=RolloutPlan(
            samples=samples, temperature=temperature, prompt_view="teacher" if generate_from_teacher else None
        ),
        views={"teacher": itself(teacher, shows, weights, update_rate)},
        temperature=temperature,
        terms=(Term("divergence", pathwise(chosen), weight=after(skip), denominator=weighted()),),
        limits=(
            Limit({"skip": 0}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"skip": 0, "divergence": "reverse_kl"}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"skip": 0, "divergence": "jsd"}, equals=("gkd", {"divergence": "jsd"})),
            Limit({"top_k": 10**9}, equals=("sdft", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 2048},
            "optimizer": {"learning_rate": 2e-5, "updates": 1},
        },
        watch=(
            Watch("forward_kl", forward_kl(), by_position=True),
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
