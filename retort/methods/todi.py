"""ToDi: forward or reverse KL, id by id."""

from retort import divergences
from retort.divergences import reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="ToDi: Token-wise Distillation via Fine-Grained Divergence Control",
        authors="Jung, Seongryong and Yoon, Suwan and Kim, DongGeon and Lee, Hwanhee",
        year=2025,
        arxiv="2505.16297",
        venue="EMNLP 2025",
    ),
    status="faithful",
)
def todi(
    *, sharpness: float = 1.0, on_policy_fraction: float = 1.0, samples: int = 1, temperature: float = 1.0
) -> Method:
    r"""Forward KL on ids to which the teacher gives more, reverse KL on those to which the student does, id by id.

    .. math:: \sum_v \alpha_v\,p_T \ln\frac{p_T}{p_S} + (1 - \alpha_v)\,p_S \ln\frac{p_S}{p_T}, \qquad
              \alpha_v = \sigma(\beta \ln\frac{p_T}{p_S}) \text{, detached}

    The sum runs over the whole vocabulary, in nats, and is divided by all counted tokens. It is infinite where one side
    rules an id out.

    Args:
        sharpness: beta; at 1 alpha is p_T / (p_T + p_S), at 0 this is half of the sum of both KLs.
        on_policy_fraction: Share of prompts with student rollouts; below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the paper: it distils on the data's responses; here the student generates, unless
    `on_policy_fraction` is 0.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.9, 0.1]]).log()
        >>> losses = token_losses("todi", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # above both KLs, 0.3681 and 0.5108, because each id takes mostly its positive part
        tensor(0.8789)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction),
        terms=(Term("divergence", pathwise(divergences.todi(sharpness))),),
        limits=(Limit({"sharpness": 0.0}, equals=("decoupled_kl", {"reverse_weight": 0.5})),),
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
