"""GOLD: distributions that are merged over aligned units, and compared by their sorted numbers."""

from retort.divergences import Merge, merged_distance
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._stop import stop_terms
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Unlocking On-Policy Distillation for Any Model Family",
        authors="Pati{\\~n}o, Carlos Miguel and Rasul, Kashif and Gallou{\\'e}dec, Quentin and Burtenshaw, Ben and "
        "Paniego, Sergio and Srivastav, Vaibhav and Frere, Thibaud and Beeching, Ed and Tunstall, Lewis and "
        "von Werra, Leandro and Wolf, Thomas",
        year=2025,
        url="https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation",
    ),
    status="partial",
)
def gold(
    *,
    merge: Merge = "observed",
    hybrid: bool = False,
    teacher_weight: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    stop_coef: float = 0.0,
    on_policy_fraction: float = 0.5,
    samples: int = 1,
    temperature: float = 0.9,
) -> Method:
    r"""The distance of both models' sorted probabilities, each merged over the tokens of an aligned unit.

    .. math:: \sum_i | m_S^{(i)} - m_T^{(i)} |, \quad m(u) = p(u \mid \ldots) \prod_{other\ j} p(v_j)

    at each unit, where v are a model's own tokens of the unit and one position gives the distribution: the first
    (`observed`) or the last (`bayesian`). m is the right probability of what was written, and is not normalised, by
    design. Without `hybrid` and with single tokens this is `uld` on all ids; with `hybrid` and one tokenizer it is
    `gkd`. The loss is divided by the student's tokens that lie in units.

    Args:
        merge: The position whose distribution counts.
        hybrid: Compare shared ids by the Jensen-Shannon divergence, nats, and sort only the others.
        teacher_weight: The teacher's weight in that divergence, strictly between 0 and 1; only `hybrid` uses it.
        matched_weight: Weight of the shared ids with `hybrid`; null: their share of the teacher's ids.
        unmatched_weight: Weight of the others with `hybrid`; null: one minus that share. Set both, or neither.
        stop_coef: Coefficient of a forward KL of the decision to stop (see `simct`). Not in the paper.
        on_policy_fraction: Share of rollouts; the rest are responses of the data, which then needs such a column.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the released code (TRL): `observed` takes the distribution that the first token was drawn from (the
    code takes the one after it); probabilities are not bounded below at 1e-8; the stop counts (the code leaves the last
    token out on both sides, so nobody learns to stop); the denominator is a batch's tokens (there each sequence's
    units, and a mean over sequences). No cross-entropy on the data, whose weight is 0 there. Sorting all ids costs more
    than `uld`, which sorts the 1,024 largest.

    Example:
        >>> from retort.functional import cross_token_losses
        >>> losses = cross_token_losses(
        ...     "gold",
        ...     student_logits=tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log(),
        ...     teacher_logits=tensor([[0.25, 0.75]]).log(),
        ...     student_tokens=tensor([1, 2]),
        ...     teacher_tokens=tensor([1]),
        ...     student_pieces=[b"a", b"b"],
        ...     teacher_pieces=[b"ab"],
        ...     shared=[],
        ... )
        >>> losses.terms["distance"].value  # of (0.5, 0.25, 0.25) times 0.5 to (0.75, 0.25, 0)
        tensor([0.7500, 0.0000])
    """
    distance = merged_distance(
        merge,
        hybrid=hybrid,
        teacher_weight=teacher_weight,
        matched_weight=matched_weight,
        unmatched_weight=unmatched_weight,
    )
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction),
        terms=(Term("distance", pathwise(distance)), *stop_terms(stop_coef)),
        limits=(
            Limit({}, equals=("uld", {"top_k": 1_000_000})),
            Limit({"merge": "bayesian"}, equals=("uld", {"top_k": 1_000_000})),
            Limit({"hybrid": True}, equals=("gkd", {})),
        ),
        recipe={"rollout": {"max_new_tokens": 128}},
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
