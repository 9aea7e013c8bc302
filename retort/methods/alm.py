"""ALM: the likelihoods of what was written, in units that both tokenizers have."""

from typing import Literal

from retort.divergences import unit_likelihood
from retort.estimators import pathwise
from retort.method import Method, Paper, Term, Watch, method
from retort.methods._stop import stop_terms
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        authors="Minixhofer, Benjamin and Vuli{\\'c}, Ivan and Ponti, Edoardo Maria",
        year=2025,
        arxiv="2503.20083",
    ),
    status="partial",
)
def alm(
    *,
    tau: float = 100.0,
    divergence: Literal["forward_kl", "reverse_kl", "total_variation"] = "forward_kl",
    stop_coef: float = 0.0,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""A divergence between the probabilities that student and teacher give to each unit that was written.

    .. math:: D\big(p_T^{1/\tau} \,\Vert\, p_S^{1/\tau}\big), \quad p = \prod_j p(v_j)

    of two binary events: the unit is written, or it is not. It reads one number per unit of the teacher, and needs no
    id in common. The loss is in nats (total variation: without a unit) and divided by the student's tokens that lie in
    units.

    Args:
        tau: The root, at least 1; without one a long unit is all but impossible on both sides, and so all but equal.
        divergence: D.
        stop_coef: Coefficient of a forward KL of the decision to stop (see `simct`). Not in the paper.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: on the student's own completions; units are minimal. Reconstructed: the direction of D.
    The paper's debiasing of units by the tokens that may follow them, and its other terms, are not offered.

    Example:
        >>> student, teacher = tensor([[0.25, 0.75]]).log(), tensor([[0.5, 0.5]]).log()
        >>> method = retort.load("alm", tau=1)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # KL of (0.5, 0.5) to (0.25, 0.75); of their hundredth roots at the default
        tensor(0.1438)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        terms=(Term("divergence", pathwise(unit_likelihood(tau, divergence))), *stop_terms(stop_coef)),
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
