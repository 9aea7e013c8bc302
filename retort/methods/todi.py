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
    r"""At every id the forward KL's term where the teacher gives it more, the reverse KL's where the student does.

    .. math:: \sum_v \alpha_v\,p_T \ln\frac{p_T}{p_S} + (1 - \alpha_v)\,p_S \ln\frac{p_S}{p_T}, \qquad
              \alpha_v = \sigma(\beta \ln\frac{p_T}{p_S}) \text{, detached}

    Over the whole vocabulary, nats; divided by all counted tokens. Infinite where one side rules an id out.

    Args:
        sharpness: beta; at 1 alpha is p_T / (p_T + p_S), at 0 this is half of the sum of both KLs.
        on_policy_fraction: Share of prompts that the student answers; below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        temperature: Of sampling only.

    Departures from the paper: it distils on given answers; here the student writes, unless `on_policy_fraction` is 0.
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
