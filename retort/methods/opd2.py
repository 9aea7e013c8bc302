"""OPD2: what a teacher has learnt since its base model, as a reward."""

from retort.advantages.delta import delta_kept, gated_delta
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View

_BASE = "teacher_base"


@method(
    paper=Paper(
        title="On-Policy Delta Distillation",
        authors="Heo, Byeongho and Hwang, Jaehui and Yun, Sangdoo and Han, Dongyoon",
        year=2026,
        arxiv="2607.15161",
        url="https://github.com/naver-ai/opd2",
    ),
    status="faithful",
)
def opd2(
    *,
    top_k: int = 1024,
    scale: float = 0.1,
    clip: float | None = 0.2,
    samples: int = 1,
    temperature: float = 0.7,
) -> Method:
    r"""The teacher's log-ratio to its own base as a reward, where it has the sign of that to the student.

    .. math:: A_t = s\,A^\Delta_t\,[A^\Delta_t A^S_t > 0], \quad A^i_t = R^i_t - \sum_{v \in TopK(p_S)} p_S(v)\,R^i(v)

    with :math:`R^\Delta = \log p_T - \log p_B` and :math:`R^S = \log p_T - \log p_S`. The loss is PPO's on A, in nats,
    divided by all counted tokens. Where `opd` asks what the teacher says, this asks what its post-training changed, and
    the gate keeps it to tokens at which the teacher also differs from the student in that direction. Without the gate
    the optimum is the one token of the largest R, for ever.

    The base model is the model `teacher_base` of a run (`models.teacher_base.path=DIR`): the teacher before its
    post-training. The two must share pre-training and template, or their difference means nothing. In `exopd` the base
    is the student before the run instead.

    Args:
        top_k: Ids of the student in the centre; at or above the vocabulary the centre is exact, and the expected
            gradient that of the uncentred reward.
        scale: s.
        clip: PPO's epsilon on the ratio to the student before the batch; null for none. The specification names a clip
            without its size; 0.2 is the default of the framework of the released code.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Departures: none that is known. Advantages are those of the student before the first update on a batch. The paper
    reports 54.6, 70.3 and 71.6 for students of 1.7B, 4B and 8B on mathematics, with `opd` at 51.0, 64.0 and 65.9.

    Example:
        >>> student, teacher, base = (tensor([[p, 1 - p]] * 2).log() for p in (0.5, 0.8, 0.4))
        >>> given = {"tokens": tensor([0, 1]), "extra_views": {"teacher_base": base}}
        >>> method = retort.load("opd2", temperature=1.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["delta"].value  # ln 2 and ln(1 / 3), less their mean of -0.2027, times -0.1
        tensor([-0.0896,  0.0896])
    """
    score = score_function(gated_delta(_BASE, top_k, scale), clip=clip)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": View.same_prompt(), _BASE: View(model=_BASE)},
        temperature=temperature,
        terms=(Term("delta", score),),
        limits=(Limit({"top_k": 10**9}, equals=("opd2", {"top_k": 10**6})),),
        recipe={
            "rollout": {"max_new_tokens": 8192},
            "optimizer": {"learning_rate": 5e-6, "schedule": "cosine", "updates": 1, "grad_clip": 1.0},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("delta_kept", delta_kept(_BASE, top_k)),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("delta")),
        ),
    )
