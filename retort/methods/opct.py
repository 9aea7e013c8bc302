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
    r"""Sampled reverse KL to the student as it was, under the prompt without what is not to change the answer.

    .. math:: \ell_t = -\rho_t A_t, \quad A_t = -\lambda \sum_{u \ge t} \gamma^{u-t} k_u, \quad
              k_t = \log p_{old}(y_t | \tilde x) - \log p_T(y_t | x)

    The student answers :math:`\tilde x`, the `prompt` of a row: with the biased hint, the jailbreak, or without the
    safety rule. The teacher, frozen as it was before training, sees x, the row's column `clean`. k is fixed for the
    batch; its mean estimates the reverse KL (never negative) and is logged as `reverse_kl`: it should fall. Nats;
    divided by all counted tokens. No labels and no judge take part.

    Args:
        kl_coef: lambda, dimensionless.
        discount: gamma, of what follows a token in its answer; 0 for the token alone.
        clip: PPO's epsilon on the ratio; null for none, as in the paper.
        teacher: `self`; or `outside`, the run's teacher under the clean prompt.
        samples: Rollouts per prompt.
        temperature: Of sampling only; both log-probs are at temperature 1.

    Defaults are of the paper's first setting (SAGE, Llama 3.1 8B). Its others: sycophancy 2, 0.9, and 4 samples at
    temperature 0.7; jailbreaks 2, 0, and 8 at 1.5. Above or below temperature 1 the answers are not quite the
    student's own, as in the paper.

    Departures: ratio and k are against the trainer's own log-probs before the first update on the batch, where the
    paper takes the sampler's; the loss is divided by the tokens (the recipe it builds on sums them). The paper
    trains an adapter (`lora.rank` 32), which the recipe leaves to you.
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
