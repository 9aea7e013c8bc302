"""Strict cross-tokenizer distillation: only where both tokenizers agree on a token."""

from retort.divergences import strict_shared_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._stop import stop_terms
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Rethinking Cross-Tokenizer On-Policy Distillation: From Alignment Coverage to Supervision Reliability",
        authors="Hou, Bingxi and Jiang, Guochao and Quan, Guofeng and Li, Weiqing and Feng, Wenfeng and Liu, Guohua "
        "and Zhang, Yuewei",
        year=2026,
        arxiv="2610.08448",
    ),
    status="faithful",
)
def strict_ct(*, top_k: int | None = 16, stop_coef: float = 0.0, samples: int = 1, temperature: float = 1.0) -> Method:
    r"""Reverse KL to a teacher with another tokenizer on the student's top-k shared ids, at tokens that both have.

    .. math:: D_{KL}(\bar p_S \Vert \bar p_T), \quad \bar p \text{ renormalised on } TopK(p_S, k) \cap V_S \cap V_T

    at every unit that is one shared id on both sides, and 0 at all others, where nothing is learnt. The paper found
    those units to be 85 to 97 percent of the student's tokens, and every addition for the others to do harm. The loss
    is in nats and divided by the student's tokens that lie in units.

    Args:
        top_k: k, at least 2; null, or more than there are, for all shared ids.
        stop_coef: Coefficient of a forward KL of the decision to stop (see `simct`). Not in the paper.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: the denominator (its code is not public, and the notes say only that the loss is a sum).
    The stop is a shared pair, because a student that is not taught to stop does not.

    Example:
        >>> from retort.functional import cross_token_losses
        >>> losses = cross_token_losses(
        ...     "strict_ct",
        ...     student_logits=tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]]).log(),
        ...     teacher_logits=tensor([[0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]).log(),
        ...     student_tokens=tensor([0, 2]),
        ...     teacher_tokens=tensor([0, 2]),
        ...     student_pieces=[b"a", b"b"],
        ...     teacher_pieces=[b"a", b"b"],
        ...     shared=[(0, 0), (1, 1)],
        ... )
        >>> losses.terms["divergence"].value  # KL of (5/8, 3/8) to (1/2, 1/2); the second id is shared by no pair
        tensor([0.0316, 0.0000])
    """
    if top_k == 1:
        raise UserError(
            "method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt; raise it, or set "
            "it to null for all shared ids"
        )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        terms=(Term("divergence", pathwise(strict_shared_kl(top_k))), *stop_terms(stop_coef)),
        limits=(
            Limit({}, equals=("topk_kl", {})),
            Limit({"top_k": None}, equals=("gkd", {"divergence": "reverse_kl"})),
        ),
        recipe={
            "rollout": {"prompts": 512},
            "optimizer": {"learning_rate": 1e-6, "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
