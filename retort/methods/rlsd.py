"""RLSD: the reward gives the direction, a teacher that knows the solution gives each token's size."""

from typing import Literal

from retort.advantages.outcome import group_advantage
from retort.core.schedules import Schedule
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import outside_bound, sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import frozen, hard_copy
from retort.teachers.views import privileged
from retort.weights import directed_ratio


@method(
    paper=Paper(
        title="Self-Distilled RLVR",
        authors="Yang, Chenxu and Qin, Chuanyu and Si, Qingyi and others",
        year=2026,
        arxiv="2604.03128",
    ),
    status="faithful",
)
def rlsd(
    *,
    share: float = 0.5,
    share_steps: int | None = None,
    bound: float = 0.2,
    negative_only: bool = False,
    shows: Literal["solution", "answer", "hint"] = "solution",
    teacher: Literal["frozen", "hard_copy", "outside"] = "frozen",
    copy_every: int = 10,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    samples: int = 4,
    temperature: float = 1.0,
) -> Method:
    r"""GRPO whose advantage is larger at tokens on which a teacher with the solution agrees with the reward's verdict.

    .. math:: \hat A_t = A\,\big[(1-\lambda) + \lambda\,\mathrm{clip}(e^{\mathrm{sign}(A)\,\delta_t}, 1-\epsilon,
              1+\epsilon)\big], \quad \delta_t = \log p_T(y_t) - \log p_{old}(y_t)

    in PPO's clipped loss, with A the group's whitened reward. The bracket is positive and takes no gradient: the
    teacher never reverses a verdict. The loss is divided by all counted tokens; rollouts whose row has nothing to show
    are left out.

    Args:
        share: lambda, in [0, 1]; at 0 it is GRPO.
        share_steps: Batches over which lambda falls in a straight line to 0; null keeps it.
        bound: epsilon of the magnitude.
        negative_only: Weight only the tokens of rollouts below their group's mean.
        shows: Column of the data that the teacher sees.
        teacher: The student as it was before training, a `hard_copy` of it every `copy_every` optimizer steps, or an
            `outside` model.
        copy_every: Optimizer steps between two copies of `hard_copy`.
        clip_low: PPO's epsilon below 1; null for no clip, then on neither side.
        clip_high: PPO's epsilon above 1.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures from the released code: a restriction to tokens of the model's thoughts, which it can make, is not
    offered; the words around what is shown are Retort's (`templates`).

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 2).log(), tensor([[0.8, 0.2]] * 2).log()
        >>> given = {"rollouts": tensor([0, 1]), "groups": tensor([0, 0]), "rewards": tensor([1.0, 0.0])}
        >>> given |= {"tokens": tensor([0, 0])}
        >>> losses = token_losses("rlsd", student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["outcome"].weight  # (1 + 1.2) / 2 where teacher and reward agree, else (1 + 0.8) / 2
        tensor([1.1000, 0.9000])
    """
    if (clip_low is None) != (clip_high is None):
        raise UserError("method.clip_low and method.clip_high: give both, or null for both")
    if share_steps is not None and share_steps < 1:
        raise UserError(f"method.share_steps must be at least 1, not {share_steps}")
    if not 0.0 <= share <= 1.0:
        raise UserError(f"method.share must lie in [0, 1], not {share:g}")
    advantage = group_advantage()
    clip = None if clip_low is None or clip_high is None else (clip_low, clip_high)
    scalar = share if share_steps is None else _falling(share, share_steps)
    size = directed_ratio(advantage, share=scalar, bound=bound, negative_only=negative_only)
    weights = hard_copy(copy_every) if teacher == "hard_copy" else frozen()
    score = score_function(advantage, clip=clip)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": privileged(shows, model="teacher" if teacher == "outside" else "student", weights=weights)},
        temperature=temperature,
        terms=(Term("outcome", score, weight=size if share > 0.0 else None),),
        limits=(
            Limit({"share": 0.0}, equals=("rlsd", {"bound": 0.0})),
            Limit({"share_steps": 10}, equals=("rlsd", {})),  # at the first step
        ),
        recipe={
            "rollout": {"prompts": 256},
            "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("magnitude", size),
            Watch("magnitude_cut_low", outside_bound(advantage, bound, "low")),
            Watch("magnitude_cut_high", outside_bound(advantage, bound, "high")),
            Watch("clip_fraction", score.clipped("outcome")),
        ),
    )


def _falling(start: float, steps: int) -> Schedule:
    """A schedule from `start` in a straight line to 0 at a step, and 0 from there on."""
    return lambda step, _: start * max(0.0, 1.0 - step / steps)
