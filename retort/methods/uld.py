"""Universal Logit Distillation: sorted probabilities, whatever the ids are."""

from retort.divergences import sorted_distance
from retort.estimators import pathwise
from retort.method import Method, Paper, Term, Watch, method
from retort.methods._stop import stop_terms
from retort.quantities import matched_tokens, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        authors="Boizard, Nicolas and El Haddad, Kevin and Hudelot, C{\\'e}line and Colombo, Pierre",
        year=2024,
        arxiv="2402.12030",
    ),
    status="partial",
)
def uld(
    *, top_k: int = 1024, coef: float = 1.0, stop_coef: float = 0.0, samples: int = 1, temperature: float = 1.0
) -> Method:
    r"""The distance of the sorted probabilities of student and teacher, which needs no id in common.

    .. math:: \sum_i | p_S^{(i)} - p_T^{(i)} |, \quad p^{(1)} \ge p^{(2)} \ge \ldots

    at the first position of each unit, where both stand at the same byte. Which token a probability belongs to plays no
    part, so a student that is as sure as the teacher of another token counts as equal. The loss has no unit (0 to 2)
    and is divided by the student's tokens that lie in units.

    Args:
        top_k: Number of the largest probabilities of each side, those of KDFlow; the rest of each is one more number.
        coef: Weight of the term. The paper's 1.5 is beside a cross-entropy on the data, which there is none of here.
        stop_coef: Coefficient of a forward KL of the decision to stop (see `simct`). Not in the paper.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: on the student's own completions and without its cross-entropy; positions are paired by
    the bytes before them (there by their index); probabilities beyond `top_k` are one number (as in KDFlow).

    Example:
        >>> student, teacher = tensor([[0.5, 0.3, 0.2]]).log(), tensor([[0.1, 0.1, 0.8]]).log()
        >>> losses = token_losses("uld", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # |0.5 - 0.8| + |0.3 - 0.1| + |0.2 - 0.1|
        tensor(0.6000)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        terms=(Term("distance", pathwise(sorted_distance(top_k)), coef=coef), *stop_terms(stop_coef)),
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("matched_tokens", matched_tokens()),
            Watch("student_entropy", student_entropy()),
        ),
    )
