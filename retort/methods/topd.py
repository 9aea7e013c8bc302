"""TOPD: a proximal teacher, between the student and the teacher."""

from retort.advantages.proximal import Return, proximal_log_ratio, proximal_return
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="TOPD: On-Policy Distillation from a Proximal Teacher",
        authors="{The authors of arXiv 2607.04751}",
        year=2026,
        arxiv="2607.04751",
    ),
    status="reconstructed",
)
def topd(
    *,
    teacher_weight: float = 0.2,
    returns: Return = "mean",
    normalise: bool = True,
    clip: float | None = 0.2,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL to a mixture of teacher and student: a reward that cannot fall below log(1 - alpha).

    .. math:: r_t = \log\Big((1-\alpha) + \alpha\,\frac{p_T(y_t)}{p_{old}(y_t)}\Big), \quad
              R_t = \frac{1}{T - t + 1} \sum_{u \ge t} r_u, \quad A_t = \frac{R_t - \bar R}{\sigma_R + 10^{-6}}

    The loss is PPO's on A, divided by all counted tokens; r is in nats, A without a unit. A token that the teacher
    would never write costs a little and not everything. The mean of r over the student's tokens is minus the skewed
    reverse KL of `skew_kl` (`direction=reverse`, `skew` = 1 - alpha), whose gradient also moves the mixture. For small
    alpha, r / alpha is :math:`p_T / p_{old} - 1`.

    Args:
        teacher_weight: alpha, in (0, 1]; 0.1, 0.2 and 0.3 did alike in the paper. 1 is the log-ratio of `opd`.
        returns: R: the mean of the ratios from the token to the end of its completion, or that of the `token` alone.
        normalise: Whether mean and deviation over the tokens of the batch are taken off.
        clip: PPO's epsilon on the ratio to the student before the batch, which is used for several updates; null for
            none.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    The reward is the paper's. Return and normaliser are reconstructed from a note that names both and prints neither.
    The paper reports AIME24 at 50.4 after 24.6 with `opd` (30B to 8B), a weak number for `opd`; nobody has published a
    re-run. Several passes over a
    batch (`optimizer.epochs`) are said to matter much; how many is not in the note.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 2).log(), tensor([[1.0, 0.0]] * 2).log()
        >>> method = retort.load("topd", returns="token", normalise=False)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0, 1]))
        >>> losses.terms["reverse"].value  # -ln(0.8 + 0.2 * 2) and -ln 0.8, where `opd` is infinite
        tensor([-0.1823,  0.2231])
    """
    score = score_function(proximal_return(teacher_weight, returns, normalise=normalise), clip=clip)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("reverse", score),),
        limits=(
            Limit({"teacher_weight": 1.0, "returns": "token", "normalise": False, "clip": None}, equals=("opd", {})),
        ),
        recipe={"rollout": {"prompts": 4096, "max_new_tokens": 16384}},
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("proximal_log_ratio", proximal_log_ratio(teacher_weight)),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("reverse")),
        ),
    )
