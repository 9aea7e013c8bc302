"""The per-id policy gradient on a top-k that was released as top-k OPD."""

from retort import divergences
from retort.divergences import SupportChoice, Weighting, reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Rethinking On-Policy Distillation of Large Language Models: Phenomenology, Mechanism, and Recipe",
        authors="Li, Yaxuan and Zuo, Yuxin and He, Bingxiang and others",
        year=2026,
        arxiv="2604.13016",
    ),
    status="faithful",
)
def topk_score(
    *,
    top_k: int = 16,
    support: SupportChoice = "student",
    weighting: Weighting = "student",
    samples: int = 4,
    temperature: float = 1.0,
) -> Method:
    r"""A policy gradient on every id of the student's top-k: its log-ratio, weighted by its renormalised probability.

    .. math:: -\sum_{v \in S_t} sg[w_v\,(\log p_T(v) - \log p_S(v))]\,\frac{p_S(v)}{sg[p_S(v)]}

    Log-probs are of the whole softmax. Its gradient is that of the reverse KL only where the support is the vocabulary:
    what a KL on a support has through the mass of the support is missing. The loss is in nats, summed over ids and
    divided by all counted tokens.

    Args:
        top_k: k of each side.
        support: Top-k of one side or both: the student's, the teacher's, both together, what they share, or what only
            one of them names (`symmetric_difference`; its weights are probabilities, not renormalised).
        weighting: w: the student's probabilities renormalised on the support, the teacher's, or all alike.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures from the released code: the importance ratio of an id is against the live student, so it is 1, and PPO's
    clip on it never binds (as there, with one update per batch).

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.2, 0.2, 0.6]]).log()
        >>> method = retort.load("topk_score", top_k=2)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # -(5/8 ln(0.2 / 0.5) + 3/8 ln(0.2 / 0.3)), where `topk_kl` has 0.0316
        tensor(0.7247)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("divergence", pathwise(divergences.topk_score(top_k, support, weighting))),),
        limits=(Limit({"top_k": 10**9}, equals=("gkd", {"divergence": "reverse_kl"})),),
        recipe={
            "rollout": {"prompts": 64, "max_new_tokens": 7168, "max_prompt_tokens": 1024},
            "optimizer": {"learning_rate": 1e-6, "schedule": "constant", "updates": 1},
            "eval": {"samples": 16, "temperature": 0.7, "top_p": 0.95},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
