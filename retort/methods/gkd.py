"""Generalised knowledge distillation: any exact divergence, on student rollouts mixed with responses of the data."""

from typing import Literal

from retort.divergences import forward_kl, jsd, reverse_kl
from retort.estimators import pathwise
from retort.method import Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        authors="Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and "
        "Geist, Matthieu and Bachem, Olivier",
        year=2024,
        arxiv="2306.13649",
        venue="ICLR 2024",
    ),
    status="faithful",
)
def gkd(
    *,
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd",
    teacher_weight: float = 0.5,
    on_policy_fraction: float = 0.5,
    samples: int = 1,
    temperature: float = 0.9,
) -> Method:
    r"""An exact divergence over the whole vocabulary, on student rollouts mixed with the responses of the data.

    .. math:: L = (1-\lambda)\,E_{data}[D] + \lambda\,E_{y \sim p_S}[D]

    No gradient goes through the sampling. The loss is divided by all counted tokens, those of responses and of rollouts
    alike.

    Args:
        divergence: D. `jsd` is symmetric at `teacher_weight` 0.5 and then at most ln 2 nats.
        teacher_weight: w of the Jensen-Shannon divergence, strictly between 0 and 1; only `jsd` uses it. The paper's
            ends 0 and 1 are the other two divergences, by name.
        on_policy_fraction: lambda, drawn prompt by prompt. Below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1, as in the paper.

    Departures from the paper: lambda is drawn per prompt, not per batch (the same expectation, less noise).

    Example:
        >>> student, teacher = tensor([[1.0, 0.0]]).log(), tensor([[0.0, 1.0]]).log()
        >>> losses = token_losses("gkd", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # ln 2, the largest Jensen-Shannon divergence: the two have no id in common
        tensor(0.6931)
    """
    chosen = {"jsd": lambda: jsd(teacher_weight), "forward_kl": forward_kl, "reverse_kl": reverse_kl}[divergence]()
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction),
        terms=(Term("divergence", pathwise(chosen)),),
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
