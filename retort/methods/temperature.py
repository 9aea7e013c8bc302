"""A temperature in the loss, apart from that of sampling."""

from typing import Literal

from retort.divergences import forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, topk_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Rethinking the Role of Temperature in Large Language Model Distillation",
        authors="Luong, Hoang-Chau and Chen, Lingwei",
        year=2026,
        arxiv="2606.00306",
    ),
    status="partial",
)
def temperature(
    *,
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "topk_kl"
    ] = "forward_kl",
    loss_temperature: float = 2.0,
    squared: bool = True,
    on_policy_fraction: float = 1.0,
    samples: int = 1,
    sampling_temperature: float = 1.0,
) -> Method:
    r"""A divergence between both distributions at a temperature of the loss, which is not that of sampling.

    .. math:: \tau^2 D(p_T^\tau, p_S^\tau), \qquad p^\tau = softmax(z / \tau)

    In forward KL the temperature changes the target, so that more ids than the first carry signal. In reverse KL the
    teacher enters through raw differences of logits, and the temperature only flattens the student's weights. As tau
    grows, tau^2 times either tends to half of the variance of z_S - z_T over the vocabulary. The loss is divided by all
    counted tokens. A run's curves `tempered_...` are at this temperature, too, and do not compare with other methods';
    its table does.

    Args:
        divergence: D over the whole vocabulary (`topk_kl`: on the student's 16 most likely ids, renormalised).
        loss_temperature: tau. The paper's grid was not found; 2 for forward KL is a reconstruction.
        squared: The factor tau^2, which keeps the gradient's size; whether the paper has it was not found.
        on_policy_fraction: Share of prompts with student rollouts; below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        sampling_temperature: Temperature of sampling.

    Departures from the paper: it distils on the data's responses; here the student generates, unless
    `on_policy_fraction` is 0.

    Example:
        >>> student, teacher = tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]])
        >>> method = retort.load("temperature", loss_temperature=100.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> round(losses.loss.item(), 3)  # half of the variance of z_S - z_T = (-2, 0), to which it tends
        0.5
    """
    chosen = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jsd,
        "skew_forward_kl": skew_forward_kl,
        "skew_reverse_kl": skew_reverse_kl,
        "topk_kl": topk_kl,
    }[divergence]()
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=sampling_temperature, on_policy_fraction=on_policy_fraction),
        temperature=loss_temperature,
        terms=(Term("divergence", pathwise(chosen), coef=loss_temperature**2 if squared else 1.0),),
        limits=(
            Limit({"loss_temperature": 1.0}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"loss_temperature": 1.0, "divergence": "reverse_kl"}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"loss_temperature": 1.0, "divergence": "topk_kl"}, equals=("topk_kl", {})),
        ),
        watch=(
            Watch("tempered_reverse_kl", reverse_kl()),
            Watch("tempered_student_entropy", student_entropy()),
            Watch("tempered_teacher_entropy", teacher_entropy()),
        ),
    )
