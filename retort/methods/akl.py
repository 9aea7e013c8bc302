"""Adaptive KL: forward KL where the teacher's head is missed, reverse KL where its tail is."""

from retort import divergences
from retort.divergences import forward_kl, reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        authors="Wu, Taiqiang and Tao, Chaofan and Wang, Jiahao and Yang, Runming and Zhao, Zhe and Wong, Ngai",
        year=2024,
        arxiv="2404.02657",
        venue="COLING 2025",
    ),
    status="faithful",
)
def akl(
    *, head_mass: float = 0.5, on_policy_fraction: float = 1.0, samples: int = 1, temperature: float = 1.0
) -> Method:
    r"""A mix of forward and reverse KL, weighted at each token by where the two distributions differ.

    .. math:: w_h\,D_{KL}(p_T \Vert p_S) + (1 - w_h)\,D_{KL}(p_S \Vert p_T), \quad
              w_h = \frac{\sum_{v \in head} |p_T - p_S|}{\sum_v |p_T - p_S|}

    The head is the teacher's most likely ids with a cumulative probability of at most mu, and always the first one. w_h
    is detached. The loss is in nats and divided by all counted tokens.

    Args:
        head_mass: mu, in (0, 1]. At 1 every id is head, and this is the forward KL.
        on_policy_fraction: Share of prompts with student rollouts; below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: it distils on the data's responses; here the student generates, unless
    `on_policy_fraction` is 0.

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.7, 0.2, 0.1]]).log()
        >>> losses = token_losses("akl", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # w_h = 0.2 / (0.2 + 0.1 + 0.1) is 1/2, so this is the mean of both KLs
        tensor(0.0886)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction),
        terms=(Term("divergence", pathwise(divergences.akl(head_mass))),),
        limits=(Limit({"head_mass": 1.0}, equals=("gkd", {"divergence": "forward_kl"})),),
        watch=(
            Watch("forward_kl", forward_kl()),
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
