"""On-policy self-distillation: the student with the reference solution in sight is its own teacher."""

from typing import Literal

from retort.advantages import log_ratio
from retort.divergences import clipped, clipped_mass, forward_kl, teacher_top
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.methods._itself import Follow, Shown, Whose, itself
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
        authors="Zhao, Siyan and Xie, Zhihui and Liu, Mengchen and Huang, Jing and Pang, Guan and Chen, Feiyu and "
        "Grover, Aditya",
        year=2026,
        arxiv="2601.18734",
    ),
    status="faithful",
)
def opsd(
    *,
    teacher_weight: float = 0.0,
    kl_clip: Unbounded | None = 0.05,
    top_k: int | None = None,
    estimator: Literal["exact", "sampled"] = "exact",
    teacher: Whose = "self",
    weights: Follow = "frozen",
    update_rate: float = 0.001,
    shows: Shown = ("solution",),
    reason_first: bool = False,
    reason_tokens: int | None = None,
    samples: int = 1,
    temperature: float = 1.1,
    top_p: float = 0.95,
) -> Method:
    r"""Forward KL from the student that sees the solution, with a cap on each id's part.

    .. math:: \ell_t = \sum_v \min(p_T(v) [\log p_T(v) - \log p_S(v)], \kappa)

    with p_T the student under the prompt with the reference solution. The sum runs over the whole vocabulary, in nats,
    and is divided by all counted tokens. An id that is cut off is pushed *down*, not ignored
    (`retort.divergences.clipped`), and the loss may be negative: watch `clipped_mass`, the share of the teacher's
    probability cut off. At 0.05 that is so even where p_T is 0.9 and p_S 0.85.

    Args:
        teacher_weight: w of the generalised Jensen-Shannon divergence; 0 is the forward KL, 1 the reverse KL.
        kl_clip: kappa, nats; null for no clip. With a teacher_weight it cuts off that divergence's entries.
        top_k: Both sides renormalised on the teacher's so many most likely ids; null for the whole vocabulary.
        estimator: `exact`; or `sampled`, the score function of the generated token, which descends the reverse KL and
            uses none of the three settings above; with several updates on a batch its log-ratio is to the student
            before the first.
        teacher: The student `self`; or `outside`, the run's teacher, shown the same; it never moves.
        weights: Weights of the teacher: `frozen` (recommended by the authors), `ema`, or `live`.
        update_rate: Update rate of `ema`: 1 minus the decay (0.999).
        shows: Columns of the data that the teacher sees; rows without are left out.
        reason_first: Whether the teacher first writes what it makes of them, once for each visit to a prompt and
            without seeing a rollout, and has that in sight, too. It writes with its own weights, as a completion is
            sampled.
        reason_tokens: Longest such text, tokens (paper: 4096); null: as long as a completion may be.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.
        top_p: Top-p of sampling.

    Defaults are those of the paper's third version as the follow-ups restate it (PW-OPSD, PAINT): forward KL with a
    clip of 0.05 and a learning rate of 5e-6. The first release of the code had the Jensen-Shannon divergence
    (`teacher_weight` 0.5), no clip, and 2e-4.

    Departures: sampling is not cut to 20 ids; the average starts at the student before training (code: after its first
    step); student and teacher get the same chat template (the paper's numbers are from a student without one). The
    paper trains an adapter (`lora.rank` 64), which the recipe leaves to you.

    Example:
        >>> student, teacher = tensor([[0.85, 0.15]]).log(), tensor([[0.9, 0.1]]).log()
        >>> method = retort.load("opsd", temperature=1.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # 0.9 ln(0.9 / 0.85) = 0.0514 is cut to 0.05; 0.1 ln(0.1 / 0.15) = -0.0405 stays
        tensor(0.0095)
    """
    if top_k == 1:
        raise UserError("method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt")
    support = None if top_k is None else teacher_top(top_k)
    exact = pathwise(clipped(kl_clip, teacher_weight, support))
    sampled = score_function(log_ratio())
    cut = () if estimator == "sampled" else (Watch("clipped_mass", clipped_mass(kl_clip, teacher_weight, support)),)
    writes = {"temperature": temperature, "top_p": top_p, "max_new_tokens": reason_tokens}
    plain = {"kl_clip": None, "temperature": 1.0}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views={"teacher": itself(teacher, shows, weights, update_rate, writes if reason_first else None)},
        temperature=temperature,
        terms=(Term("divergence", exact if estimator == "exact" else sampled),),
        limits=(
            Limit(plain, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({**plain, "teacher_weight": 1.0}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({**plain, "teacher_weight": 0.5}, equals=("gkd", {"divergence": "jsd"})),
            Limit({"kl_clip": 1e9}, equals=("opsd", {"kl_clip": None})),
            Limit({"top_k": 10**9}, equals=("opsd", {})),
            Limit({"estimator": "sampled"}, equals=("opd", {"temperature": 1.1})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 1024},
            "optimizer": {"learning_rate": 5e-6, "updates": 1, "grad_clip": 0.1},
            "eval": {"samples": 12, "temperature": 1.0, "top_p": 0.95},
        },
        watch=(
            Watch("forward_kl", forward_kl(), by_position=True),
            Watch("reverse_kl", sampled_reverse_kl()),
            *cut,
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
