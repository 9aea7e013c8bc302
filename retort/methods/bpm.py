"""Byte-prefix marginalisation: the teacher's distribution over the student's tokens, by their first bytes."""

from retort.divergences import Direction, byte_prefix, stop_bridge
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Cross-Tokenizer On-Policy Distillation via Byte-Prefix Marginalization",
        authors="Wang, Hao and Yuan, Kun and Zhong, Wenlin and Zhang, Minglei and Xiao, Han and Sun, Ming and Qi, "
        "Honggang",
        year=2026,
        arxiv="2607.22334",
    ),
    status="reconstructed",
)
def bpm(
    *,
    divergence: Direction = "forward_kl",
    teacher_weight: float = 0.5,
    whitespace: bool = False,
    stop_coef: float = 1.0,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""A divergence from what the teacher's distribution says of the student's tokens, by the bytes they begin with.

    .. math:: (1-\rho)\, D(\bar t \Vert p_S), \quad
              t(u) = \frac{1}{\pi(c)} \sum_{v:\ c \preceq b(v),\ \phi_c(v) = u} p_T(v)

    at each of the student's tokens, where c are the bytes of the teacher's token that are already written,
    :math:`\pi(c)` the probability of all tokens that begin with them, and :math:`\phi_c(v)` the longest token of the
    student's that the rest of v begins with. The probability :math:`\rho` of what has none is left out, and
    :math:`\bar t` is t over the rest. With one tokenizer it is the divergence over the whole vocabulary. A second term
    is the forward KL of the decision to stop, where the student stopped. Both are in nats and divided by the student's
    tokens that lie in units.

    Args:
        divergence: D; the reverse KL is over the ids that the teacher gives any probability.
        teacher_weight: The teacher's weight in `jsd`, strictly between 0 and 1; only `jsd` uses it.
        whitespace: Whether tokens that are whitespace only count. The paper leaves them out.
        stop_coef: Coefficient of the term on the decision to stop.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: it was not seen itself, but in another paper's summary and in notes. Exact: t at a common
    boundary and inside of a token. Reconstructed: a written token that stands for several of the teacher's gets the
    product of their probabilities, and is left out where it ends inside of one; the stop term counts where the student
    stopped; a token is whitespace by its own bytes; the residual; the denominator, which counts what is left out, too.

    Example:
        >>> from retort.functional import cross_token_losses
        >>> losses = cross_token_losses(
        ...     "bpm",
        ...     student_logits=tensor([[0.5, 0.5], [0.25, 0.75]]).log(),
        ...     teacher_logits=tensor([[0.2, 0.2, 0.6]]).log(),
        ...     student_tokens=tensor([0, 1]),
        ...     teacher_tokens=tensor([2]),
        ...     student_pieces=[b"a", b"b"],
        ...     teacher_pieces=[b"ab"],
        ...     shared=[(0, 0), (1, 1)],
        ...     vocabularies=([b"a", b"b"], [b"a", b"b", b"ab"]),
        ... )
        >>> losses.terms["divergence"].value  # of (0.8, 0.2) from (0.5, 0.5); behind "a", 3/4 are "b" and 1/4 nothing
        tensor([0.1927, 0.2158])
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        terms=(
            Term("divergence", pathwise(byte_prefix(divergence, teacher_weight=teacher_weight, whitespace=whitespace))),
            *((Term("stop", pathwise(stop_bridge()), coef=stop_coef),) if stop_coef else ()),
        ),
        limits=(
            Limit({}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"divergence": "reverse_kl"}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"divergence": "jsd", "teacher_weight": 0.3}, equals=("gkd", {"teacher_weight": 0.3})),
        ),
        recipe={"rollout": {"prompts": 256}},
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
