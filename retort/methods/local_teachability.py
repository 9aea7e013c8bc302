"""Prefix Teach, Suffix Fade: no supervision after the teacher has stopped telling the student's candidates apart."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from retort.core.reduce import weighted
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._inner import inner
from retort.quantities import teacher_margin
from retort.weights import both, release


@method(
    paper=Paper(
        title="Prefix Teach, Suffix Fade: Local Teachability Collapse in Strong-to-Weak On-Policy Distillation",
        authors="Liu, Kaiyuan and Zhuang, Ziyuan and Bai, Yang and Wang, Bing and Weng, Rongxiang and Ye, Jieping",
        year=2026,
        arxiv="2605.13643",
    ),
    status="partial",
)
def local_teachability(
    *,
    of: str = "opd",
    settings: Mapping[str, Any] | None = None,
    top_k: int = 4,
    margin: Literal["gap", "log_gap", "advantage"] = "log_gap",
    shortest: int = 3,
    max_segment: int = 128,
    min_drop: float = 0.0,
    robust: bool = False,
    divide_by: Literal["trajectory", "kept", "all"] = "trajectory",
) -> Method:
    r"""Any method, cut on each rollout where the teacher's contrast among the student's candidates collapses.

    .. math:: \ell'_t = \ell_t\,q_t\,\frac{|y|}{\sum_u q_u}, \quad q_t = [\,t \text{ before segment } \tau^*\,],
              \quad S_i = \log\Big(1 + \frac{1}{|B_i|} \sum_{t \in B_i} M_t\Big)

    with the loss :math:`\ell_t` and the denominator of the wrapped method; the kept tokens of a rollout carry the
    weight of all of its :math:`|y|` tokens. M is the teacher's margin over the student's top-k, B a sentence;
    :math:`\tau^*` is the segment at which one constant level of S is worse, by BIC, than a higher one followed by a
    lower one. Without such a drop the whole rollout counts. The cut is decided for a whole batch before the first
    update on it, and detached. Rollouts are still generated to their end. This saves no generation, and the stop token
    of a cut rollout gets no signal, so watch the length.

    Args:
        of: Name of the wrapped method.
        settings: Its settings, a table; null for its defaults.
        top_k: Candidates of the student.
        margin: M. `log_gap`, nats (the paper): first minus second log-prob of the teacher among them. `gap`: that of
            probabilities, renormalised on them. `advantage`, nats: largest minus mean log-ratio of teacher to student.
        shortest: Segments on either side of a drop (reconstructed).
        max_segment: Tokens of a segment at most; where no text is known (`token_losses`), of every segment.
        min_drop: Standard deviations that a drop must have.
        robust: Winsorise and median-filter the segments first.
        divide_by: `trajectory`: each rollout keeps the mass of its loss (the paper's; early tokens weigh more than in
            the wrapped method). `kept`: by the batch's kept tokens, where the term is divided by tokens. `all`: as in
            the wrapped method, with the same weight for a kept token.

    Written from the abstract and from a reading note that quotes the paper's equations; its text was not read. Decided
    here, because neither says it: the shortest side, the longest segment, and that S is made in the same way of other
    margins. `min_drop` and `robust` come from another reimplementation. Sentences are split by rule, where the paper
    takes NLTK. The teacher is asked about the student's candidates besides what the wrapped method asks for.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 4).log(), tensor([[0.9, 0.1]] * 2 + [[0.5, 0.5]] * 2).log()
        >>> method = retort.load("local_teachability", top_k=2, max_segment=1, shortest=1)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0, 0, 0, 0]))
        >>> losses.terms["reverse"].weight  # the margin is ln 9, then 0: two tokens are kept, and weigh what four would
        tensor([2., 2., 0., 0.])
    """
    made = inner(of, settings, outer="local_teachability")
    rule: dict[str, Any] = {
        "margin": margin,
        "shortest": shortest,
        "max_segment": max_segment,
        "min_drop": min_drop,
        "robust": robust,
    }
    cut = release(top_k, rescale=divide_by == "trajectory", **rule)

    def shortened(term: Term) -> Term:
        weight = cut if term.weight is None else both(cut, term.weight)
        by_kept = divide_by == "kept" and term.denominator.kind == "tokens"
        return replace(term, weight=weight, denominator=weighted(by="release") if by_kept else term.denominator)

    against = made.terms[0].against
    own = (
        Watch("kept_fraction", release(top_k, **rule), against=against),
        Watch("teacher_margin", teacher_margin(top_k, margin), against=against, by_position=True),
    )
    return replace(
        made,
        terms=tuple(shortened(term) for term in made.terms),
        limits=(
            Limit({"shortest": 10**9}, equals=("opd", {})),
            Limit({"shortest": 10**9, "of": "eopd"}, equals=("eopd", {})),
            Limit({"max_segment": 10**9, "divide_by": "all"}, equals=("opd", {})),
        ),
        watch=(*made.watch, *own),
    )
