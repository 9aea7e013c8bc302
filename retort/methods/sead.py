"""SEAD: a divergence for each token, or none, by the entropies of both models."""

from typing import Literal

from retort.core.reduce import weighted
from retort.core.schedules import anneal
from retort.divergences import forward_kl, reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import EasyToHard, RolloutPlan
from retort.weights import Zones
from retort.weights.zones import SILENT, SURE, UNSURE


@method(
    paper=Paper(
        title="SEAD: Competence-Aware On-Policy Distillation via Entropy-Guided Supervision",
        authors="Capital One",
        year=2026,
        arxiv="2606.28562",
    ),
    status="partial",
)
def sead(
    *,
    silent_share: float = 0.5,
    unsure_share: float = 0.1,
    forward_coef: float = 1.0,
    anneal_start: float = 0.8,
    anneal_end: float = 0.0,
    unsure_loss: Literal["faded", "blended"] = "faded",
    scope: Literal["batch", "rollout"] = "batch",
    curriculum: Literal["sorted", "gated"] | None = "sorted",
    samples: int = 1,
    temperature: float = 0.7,
) -> Method:
    r"""Reverse KL where only the student is unsure, forward KL where the teacher is, nothing where both are sure.

    .. math:: L = \frac{1}{|B \cup C|} \Big[ \sum_{t \in B} D_{KL}(p_S \Vert p_T)
              + \alpha(s)\,\lambda \sum_{t \in C} D_{KL}(p_T \Vert p_S) \Big]

    Zone C are the tokens of highest teacher entropy; of the others those of lowest student entropy are zone A, which
    gets no gradient at all, and the rest is zone B. alpha falls along half a cosine over the run. Both KLs are over the
    whole vocabulary, in nats. Zones are decided for a whole batch before the first update on it.

    Args:
        silent_share: Share of zone A.
        unsure_share: Share of zone C; what is left is zone B.
        forward_coef: lambda; not in the paper, 1 is a reconstruction.
        anneal_start: alpha at the first step, and for good where it is not known how long the run is (`token_losses`
            without `total_steps`).
        anneal_end: alpha at the end.
        unsure_loss: `faded`: zone C has the forward KL times alpha (the paper's Eq. 4), so it fades, and still counts
            in the denominator. `blended`: alpha forward + (1 - alpha) reverse (its Figure 1).
        scope: Shares hold over the batch, or in every rollout; the paper does not say.
        curriculum: Prompts from easy to hard, by the first student's pass rate over 8 completions of each, measured
            before the first step, for which the data needs answers: `sorted` goes through them once (what the paper
            ran), `gated` draws among those that are easy enough by now (what its text says). Null: shuffled.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Reconstructed: the rule of assignment is not spelled out in the paper; this one reproduces its table of shares.
    Departures: entropies are of the whole distributions, where the paper takes an unnamed top-k; PPO's clip,
    which never binds with one update per batch, is left out. Of the gated curriculum the paper gives no numbers.

    Example:
        >>> student = tensor([[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]).log()
        >>> teacher = tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5]]).log()
        >>> method, tokens = retort.load("sead", unsure_share=0.25), tensor([0, 0, 0, 0])
        >>> terms = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tokens).terms
        >>> terms["sure"].weight, terms["unsure"].weight  # zones A, B, A, C
        (tensor([0., 1., 0., 0.]), tensor([0., 0., 0., 1.]))
    """
    parts = Zones(silent=silent_share, unsure=unsure_share, scope=scope)
    sure, unsure, silent = parts.weight(SURE), parts.weight(UNSURE), parts.weight(SILENT)
    by_taught = weighted(by=f"{parts.name}.taught")
    falling = anneal(anneal_start, anneal_end)
    rising = anneal(1.0 - anneal_start, 1.0 - anneal_end)
    blended = [Term("unsure_reverse", pathwise(reverse_kl()), weight=unsure, coef=rising, denominator=by_taught)]

    def forward_weight(step: int, total_steps: int | None) -> float:
        return forward_coef * falling(step, total_steps)

    return Method(
        rollout=RolloutPlan(
            samples=samples, temperature=temperature, order=None if curriculum is None else EasyToHard(curriculum)
        ),
        terms=(
            Term("sure", pathwise(reverse_kl()), weight=sure, denominator=by_taught),
            Term("unsure", pathwise(forward_kl()), weight=unsure, coef=forward_weight, denominator=by_taught),
            *(blended if unsure_loss == "blended" else []),
        ),
        limits=(
            Limit({"silent_share": 0.0, "unsure_share": 0.0}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit(
                {"silent_share": 0.0, "unsure_share": 1.0, "anneal_start": 1.0, "anneal_end": 1.0},
                equals=("gkd", {"divergence": "forward_kl"}),
            ),
            Limit(
                {"silent_share": 0.0, "unsure_share": 1.0, "anneal_start": 0.0, "unsure_loss": "blended"},
                equals=("gkd", {"divergence": "reverse_kl"}),
            ),
        ),
        recipe={
            "rollout": {"prompts": 96, "max_new_tokens": 16384},
            "optimizer": {"schedule": "linear", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("forward_kl_unsure", forward_kl(), where=unsure),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("student_entropy_silent", student_entropy(), where=silent),
        ),
    )
