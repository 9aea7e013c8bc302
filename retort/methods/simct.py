"""SimCT: a teacher with another tokenizer, on shared ids and the units between them."""

from retort import divergences
from retort.divergences import Score
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._stop import stop_terms
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
def simct(
    *,
    score: Score = "log_prob",
    gh_threshold: float | None = None,
    stop_coef: float = 0.0,
    samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
) -> Method:
    r"""Reverse KL to a teacher with another tokenizer, over the shared ids and the unit that was written.

    .. math:: D_{KL}(Q_S \Vert Q_T), \quad Q_M = \mathrm{softmax}\big(\{\log p_M(u)\}_{u \in V_S \cap V_T} \cup
              \{\tfrac{1}{k} \textstyle\sum_j \log p_M(v_j)\}\big)

    at the first position of each minimal unit, where both tokenizations have a boundary; v are the model's own tokens
    of the unit. A unit that is one shared id on both sides needs no dimension of its own. With one tokenizer every unit
    is, and this is the reverse KL over the whole vocabulary. The loss is in nats and divided by the student's tokens
    that lie in units.

    Args:
        score: A unit's score: its mean log-prob (`log_prob`, the paper), or the mean of its raw logits (`raw_logit`,
            the released code), which a constant added to the logits of a later token changes.
        gh_threshold: Leave out units of which the teacher's mass on the shared ids and the unit is below one over this
            number; a later version of the code has 2. Null: keep all. The mass counts the unit's normalised score,
            which is no probability: a heuristic.
        stop_coef: Coefficient of a forward KL of the decision to stop, which can revive a stop that the student has all
            but given up. Not in the paper.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1, as in the paper.
        top_p: Top-p of sampling; the released scripts leave it at 1.

    Departures from the paper: none in the loss. From the released code: units are minimal (the code closes one only at
    a token that both sides have), they are found by bytes (there by decoded strings, in which a part of a character is
    lost), stops align by what they are, and the denominator is the student's tokens (there the mean of both counts, as
    in `cross_token_losses`).

    Example:
        >>> from retort.functional import cross_token_losses
        >>> losses = cross_token_losses(
        ...     "simct",
        ...     student_logits=tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log(),
        ...     teacher_logits=tensor([[0.25, 0.75]]).log(),
        ...     student_tokens=tensor([1, 2]),
        ...     teacher_tokens=tensor([1]),
        ...     student_pieces=[b"a", b"b"],
        ...     teacher_pieces=[b"ab"],
        ...     shared=[(0, 0)],
        ... )
        >>> losses.terms["divergence"].value  # of (0.5, sqrt(0.25 * 0.5)) to (0.25, 0.75), with the sum of each at 1
        tensor([0.2529, 0.0000])
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        terms=(Term("divergence", pathwise(divergences.simct(score, gh_threshold))), *stop_terms(stop_coef)),
        limits=(
            Limit({}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"score": "raw_logit"}, equals=("gkd", {"divergence": "reverse_kl"})),
        ),
        recipe={
            "rollout": {"prompts": 64, "max_new_tokens": 4096},
            "optimizer": {"learning_rate": 1e-6, "schedule": "cosine", "weight_decay": 0.0, "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
