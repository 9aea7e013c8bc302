"""On-policy consistency training: the student under a clean prompt is its own teacher."""

from retort.advantages import return_to_go
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._itself import Whose
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.views import clean


@method(
    paper=Paper(
        title="On-Policy Consistency Training Improves LLM Safety with Minimal Capability Degradation",
        authors="Han and Fujimoto and Shah and others",
        year=2026,
        arxiv="2605.21834",
    ),
    status="faithful",
)
def opct(
    *,
    kl_coef: float = 1.0,
    discount: float = 0.0,
    clip: float | None = None,
    teacher: Whose = "self",
    samples: int = 3,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL to the student before training under the clean prompt, without a bias or jailbreak.

    .. math:: \ell_t = -\rho_t A_t, \quad A_t = -\lambda \sum_{u \ge t} \gamma^{u-t} k_u, \quad
              k_t = \log p_{old}(y_t | \tilde x) - \log p_T(y_t | x)

    The student completes :math:`\tilde x`, the `prompt` of a row, which holds a biased hint or a jailbreak, or lacks
    the safety rule. The teacher, frozen as it was before training, sees x, the row's column `clean`. k is fixed for the
    batch; its mean estimates the reverse KL (never negative) and is logged as `reverse_kl`: it should fall. The loss is
    in nats and divided by all counted tokens. It needs neither labels nor a judge.

    Args:
        kl_coef: lambda, dimensionless.
        discount: gamma, for the tokens that follow in the completion; 0 for the token alone.
        clip: PPO's epsilon on the ratio; null for none, as in the paper.
        teacher: `self`; or `outside`, the run's teacher under the clean prompt.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; both log-probs are at temperature 1.

    Defaults are of the paper's first setting (SAGE, Llama 3.1 8B). Its others: sycophancy 2, 0.9, and 4 samples at
    temperature 0.7; jailbreaks 2, 0, and 8 at 1.5. At a temperature other than 1 the completions are not quite
    on-policy, as in the paper.

    Departures: ratio and k are against the trainer's own log-probs before the first update on the batch, where the
    paper takes the sampler's; the loss is divided by the tokens (the recipe it builds on sums them). The paper
    trains an adapter (`lora.rank` 32), which the recipe leaves to you.

    Example:
        >>> student, teacher = tensor([[0.8, 0.2]] * 2).log(), tensor([[0.5, 0.5]] * 2).log()
        >>> method = retort.load("opct", discount=0.5)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0, 0]))
        >>> losses.terms["consistency"].value  # k is 0.47 at both tokens; the first adds half of the second
        tensor([0.7050, 0.4700])
    """
    score = score_function(return_to_go(discount, kl_coef), clip=clip)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": clean("student" if teacher == "self" else "teacher")},
        terms=(Term("consistency", score),),
        limits=(
            Limit({}, equals=("opd", {})),
            Limit({"kl_coef": 2.0, "clip": 0.2}, equals=("opd", {"coef": 2.0, "clip": 0.2})),
            Limit({"discount": 1e-200}, equals=("opct", {})),
        ),
        recipe={
            "rollout": {"prompts": 8, "max_new_tokens": 1024},
            "optimizer": {"learning_rate": 5e-6, "schedule": "constant", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("consistency")),
        ),
    )
