"""KL on the top-k of one side or both."""

from typing import Literal

from retort import divergences
from retort.divergences import Tail, reverse_kl
from retort.errors import UserError
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
def topk_kl(
    *,
    top_k: int = 16,
    support: Literal["student", "teacher", "union", "intersection"] = "student",
    tail: Tail = "renormalised",
    direction: Literal["reverse", "forward"] = "reverse",
    samples: int = 4,
    temperature: float = 1.0,
) -> Method:
    r"""KL between both distributions renormalised on the student's k most likely ids.

    .. math:: D_{KL}(\bar p_S \Vert \bar p_T), \quad \bar p \text{ renormalised on } S_t = TopK(p_S, k)

    The gradient goes through the student's renormalisation; probability outside of the support is ignored, so this is
    another objective than the exact KL, which is its limit. The loss is in nats and divided by all counted tokens. At k
    = 1 it would be 0, and is refused.

    Args:
        top_k: k.
        support: Top-k of one side or both: the student's (the paper), the teacher's, both together, or what they share.
        tail: `renormalised`, or a `bucket` with all other ids as one, so that the mass outside of the support counts.
        direction: `reverse` is KL(student || teacher).
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures: the released code computes something else under this name, which is `topk_score` here. `bucket` and
    `forward` are not the paper's.

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.2, 0.2, 0.6]]).log()
        >>> method = retort.load("topk_kl", top_k=2)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # KL of (5/8, 3/8) to (1/2, 1/2); the teacher's 0.6 on the third id is ignored
        tensor(0.0316)
    """
    if top_k == 1 and tail == "renormalised" and support in ("student", "teacher", "intersection"):
        raise UserError(
            "method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt; raise it, or set "
            "method.tail=bucket, or take `topk_score`"
        )
    chosen = divergences.topk_kl(direction, top_k, support, tail)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("divergence", pathwise(chosen)),),
        limits=(
            Limit({"top_k": 10**9}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"top_k": 10**9, "tail": "bucket"}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"top_k": 10**9, "direction": "forward"}, equals=("gkd", {"divergence": "forward_kl"})),
        ),
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
