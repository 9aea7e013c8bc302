"""ABKD: the alpha-beta family of divergences."""

from retort.divergences import alpha_beta, reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via "
        "alpha-beta-Divergence",
        authors="Wang, Guanghui and Yang, Zhiyong and Wang, Zitai and Wang, Shi and Xu, Qianqian and Huang, Qingming",
        year=2025,
        arxiv="2505.04560",
        venue="ICML 2025",
    ),
    status="faithful",
)
def abkd(
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    on_policy_fraction: float = 1.0,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""The alpha-beta divergence, in which forward KL, reverse KL and Hellinger's distance are three points of a plane.

    .. math:: -\frac{1}{\alpha\beta} \sum_v \Big[ p_T^\alpha p_S^\beta
              - \tfrac{\alpha}{\alpha+\beta} p_T^{\alpha+\beta} - \tfrac{\beta}{\alpha+\beta} p_S^{\alpha+\beta} \Big]

    The sum runs over the whole vocabulary. The loss is divided by all counted tokens.

    Args:
        alpha: Exponent of the teacher's probabilities.
        beta: Exponent of the student's. The scripts of the released code also use (0.2, 0.7).
        on_policy_fraction: Share of prompts with student rollouts; below 1 the data needs a `response` column.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures: at alpha = 0, beta = 0 and alpha + beta = 0 the released code divides the limit by alpha or beta where
    the limit has the square; here it is the limit. The paper distils on the data's responses; here the student
    generates, unless `on_policy_fraction` is 0.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.9, 0.1]]).log()
        >>> losses = token_losses("abkd", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # 4 (1 - sqrt(0.5 * 0.9) - sqrt(0.5 * 0.1)), four times Hellinger's distance squared
        tensor(0.4223)
    """
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction),
        terms=(Term("divergence", pathwise(alpha_beta(alpha, beta))),),
        limits=(
            Limit({"alpha": 1.0, "beta": 0.0}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"alpha": 0.0, "beta": 1.0}, equals=("gkd", {"divergence": "reverse_kl"})),
        ),
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
