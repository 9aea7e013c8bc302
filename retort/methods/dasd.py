"""DASD: pulls towards a self-teacher that knows the answer where the student is sure, and away where it explores."""

import math
from typing import Literal

from retort.advantages.outcome import group_advantage
from retort.estimators import score_function
from retort.method import Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, stored_quantity, student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import frozen, live
from retort.teachers.views import privileged
from retort.weights import above, below
from retort.weights.direction import directed


@method(
    paper=Paper(
        title="Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation for LLM Reasoning",
        authors="Zhang, H. and Wang, C. and Chen, K. and Pan, Y. and Xiang, Y. and Wang, J. and Zhang, M.",
        year=2026,
        arxiv="2605.22263",
    ),
    status="reconstructed",
)
def dasd(
    *,
    direction_coef: float = 0.1,
    entropy_share: float = 0.2,
    share_from: Literal["top", "bottom"] = "top",
    gap_scale: Literal["absolute", "std", "none"] = "absolute",
    correction: Literal["normalised", "raw"] = "normalised",
    router: Literal["entropy", "attract", "repel"] = "entropy",
    correction_limit: Unbounded = math.inf,
    context: Literal["answer", "solution"] = "answer",
    teacher: Literal["self", "outside"] = "self",
    clip: float | None = 0.2,
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""The verifier's advantage, plus the privileged log-ratio with a sign that the student's entropy decides.

    .. math:: A_t = A_G + \beta\,\omega_t\,\bar\delta_t, \quad
              \omega_t = \tanh\Big(\frac{\tau_\rho - H_t}{\hat\sigma_H + \epsilon}\Big)\,\sigma(|\bar\delta_t| - 1)

    A_t is the advantage in PPO's clipped loss. H_t is the entropy of the student before the update, in nats;
    :math:`\tau_\rho` is a quantile of the rollout's entropies, :math:`\hat\sigma_H` their mean absolute deviation.
    :math:`\delta_t = \log p(y_t | x, priv) - \log p(y_t | x)`, in nats, compares the same policy with and without the
    answer, and :math:`\bar\delta_t` is delta over its usual size in the rollout. The loss is divided by all counted
    tokens.

    Args:
        direction_coef: beta. The paper's value is not public: 0.1 is a reconstruction, to be swept from 0.05 to 0.5.
        entropy_share: rho.
        share_from: `top`: this share of a rollout's tokens lies above tau. `bottom`: below, a literal quantile. Sources
            conflict: a reading note says that a small rho repels most tokens, which is `bottom`; but there tau is about
            0 in rollouts of mostly sure tokens, and next to nothing is attracted.
        gap_scale: Divisor of delta in its rollout: the mean of its sizes, its standard deviation, or nothing. Not in
            the public sources, reconstructed: the gate is centred at 1, a usual size.
        correction: Factor of omega: delta over its scale or, in another summary, the `raw` delta (nats). The two need
            different values of beta.
        router: `entropy`, or the ablations: `attract` (Conformity, the tanh is 1) and `repel` (Novelty, it is -1).
        correction_limit: Largest size of beta omega delta; infinite in the paper, where the repelling arm is unbounded.
        context: Column of the data that the self-teacher sees in addition. Sources differ: the paper's training data
            has answers only, its captions and a reading note speak of solutions.
        teacher: `self`, the live student, or an `outside` model with the same context.
        clip: PPO's epsilon; the paper's is not public, this is GRPO's.
        samples: Rollouts per prompt, which the verifier's advantage compares.
        temperature: Temperature of sampling and of both distributions.

    Reconstructed from two summaries that give the same equations and from the paper's captions; its full text was not
    read. beta, the scale of delta, the reading of rho and the clip are therefore choices. Rollouts without context lose
    the verifier's part, too. beta = 0 is GRPO.

    Example:
        >>> student, teacher = tensor([[0.6, 0.4, 0.0], [0.3, 0.3, 0.4]]), tensor([[0.9, 0.1, 0.0], [0.45, 0.15, 0.4]])
        >>> given = {"tokens": tensor([0, 0]), "groups": tensor([0]), "rewards": tensor([1.0])}
        >>> losses = token_losses("dasd", student_logits=student.log(), teacher_logits=teacher.log(), **given)
        >>> losses.terms["policy"].value  # -0.05 tanh(1.6) where the student is sure, 0.05 tanh(0.4) where it is not
        tensor([-0.0461,  0.0190])
    """
    quantile = 1.0 - entropy_share if share_from == "top" else entropy_share
    advantage = directed(
        group_advantage(),
        direction_coef,
        quantile=quantile,
        scale=gap_scale,
        router=router,
        limit=correction_limit,
        raw=correction == "raw",
    )
    outside = teacher == "outside"
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        views={
            "teacher": privileged(
                context, model="teacher" if outside else "student", weights=frozen() if outside else live()
            )
        },
        terms=(Term("policy", score := score_function(advantage, clip=clip)),),
        recipe={
            "rollout": {"prompts": 128, "max_new_tokens": 8192},
            "optimizer": {"learning_rate": 3e-6, "schedule": "cosine", "updates": 4},
            "eval": {"samples": 16, "top_p": 0.9},
        },
        watch=(
            Watch("student_entropy", student_entropy()),
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("direction", stored_quantity("direction")),
            Watch("attracted_fraction", above(stored_quantity("direction"), 0.0)),
            Watch("repelled_fraction", below(stored_quantity("direction"), 0.0)),
            Watch("correction", stored_quantity("direction.correction")),
            Watch("largest_correction", stored_quantity("direction.largest")),
            Watch("clip_fraction", score.clipped("policy")),
        ),
    )
