"""TOP-D: a proximal teacher, between the student and the teacher."""

from retort.advantages.proximal import Return, proximal_log_ratio, proximal_return
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Trust Region Policy Distillation",
        authors="Xie, Zhengpeng and Zhang, Li Lyna and Xie, Zeke and Yang, Mao",
        year=2026,
        arxiv="2607.04751",
    ),
    status="faithful",
)
def topd(
    *,
    teacher_weight: float = 0.2,
    returns: Return = "future",
    normalise: bool = True,
    clip: float | None = 0.2,
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL to a mixture of teacher and student: a reward that cannot fall below log(1 - alpha).

    .. math:: r_t = \log\Big((1-\alpha) + \alpha\,\frac{p_T(y_t)}{p_{old}(y_t)}\Big), \quad
              R_t = r_t + \frac{1}{T - t} \sum_{u > t} r_u, \quad A_t = \frac{R_t - \mu}{\sigma + 10^{-6}}

    Mean and deviation are over all tokens of a prompt's completions. The loss is PPO's on A, divided by all counted
    tokens; r is in nats, A without a unit. A token that the teacher would never write costs a little and not
    everything. The mean of r over the student's tokens is minus the skewed reverse KL of `skew_kl`
    (`direction=reverse`, `skew` = 1 - alpha), whose gradient also moves the mixture. For small alpha, r / alpha is
    :math:`p_T / p_{old} - 1`.

    Args:
        teacher_weight: alpha, in (0, 1]; the paper trains with 0.1 or 0.2 and finds 0.3 alike. 1 is the log-ratio of
            `opd`.
        returns: R: `future`, as above (the paper's Eq. 8), or the r of the `token` alone.
        normalise: Whether mean and deviation are taken off. Without them R is A.
        clip: PPO's epsilon on the ratio to the student before the batch; null for none.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Formulas and settings are the paper's, as full notes on it and a public implementation agree on them; the deviation
    is that of the population, which they do not say. The paper reports AIME24 at 50.4 after 24.6 with `opd` (30B to
    8B). Its `opd` made one update of each batch and `topd` sixteen (the recipe's `optimizer.updates`), so the
    numbers do not say what the reward alone is worth. Nobody has published a re-run.

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
        recipe={
            "rollout": {"prompts": 512, "max_new_tokens": 16384},
            "optimizer": {"learning_rate": 1e-6, "updates": 16},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("proximal_log_ratio", proximal_log_ratio(teacher_weight)),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("reverse")),
        ),
    )
