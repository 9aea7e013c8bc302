"""SimpleCTKD: the baseline of SimCT, on shared tokens only."""

from retort.divergences import strict_shared_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy Distillation",
        authors="Sun, Jie and Zheng, Mao and Song, Mingyang and Zhong, Qiyong and others",
        year=2026,
        arxiv="2605.07711",
    ),
    status="faithful",
)
def simple_ctkd(*, top_k: int | None = None, samples: int = 1, temperature: float = 0.6, top_p: float = 0.95) -> Method:
    r"""Reverse KL to a teacher with another tokenizer over all shared ids, at tokens that both have: SimCT's baseline.

    .. math:: D_{KL}(\bar p_S \Vert \bar p_T), \quad \bar p \text{ renormalised on } V_S \cap V_T

    at every unit that is one shared id on both sides, and 0 at all others. `simct` is this plus the units between them;
    `strict_ct` is this on the student's most likely shared ids. The loss is in nats and divided by the student's tokens
    that lie in units.

    Args:
        top_k: Take only the student's k most likely shared ids, at least 2; null for all.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.
        top_p: Top-p of sampling.

    Departures from the released code: as for `simct`.

    Example:
        >>> student, teacher = tensor([[0.5, 0.25, 0.25]]).log(), tensor([[0.25, 0.25, 0.5]]).log()
        >>> losses = token_losses("simple_ctkd", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # here all ids are shared: 0.5 ln 2 - 0.25 ln 2
        tensor(0.1733)
    """
    if top_k == 1:
        raise UserError(
            "method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt; raise it, or set "
            "it to null for all shared ids"
        )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        terms=(Term("divergence", pathwise(strict_shared_kl(top_k))),),
        limits=(Limit({}, equals=("strict_ct", {"top_k": None})), Limit({"top_k": 16}, equals=("strict_ct", {}))),
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
