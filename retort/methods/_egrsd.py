"""The parts that EGRSD and CL-EGRSD share: all but how far the gate looks ahead."""

from __future__ import annotations

from typing import Any, Literal

from retort.advantages.outcome import group_advantage, length_bonus, running_advantage
from retort.controllers.rewards import RunningRewards
from retort.estimators import score_function
from retort.method import Limit, Method, Term, Watch
from retort.quantities import log_ratio_size, sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers import moving
from retort.teachers.views import privileged
from retort.weights import Confidence, both, directed_ratio

Baseline = Literal["running", "group"]
Teacher = Literal["frozen", "ema", "hard_copy", "outside"]


def gated(
    gate: Confidence,
    *,
    bound: float,
    bonus: float,
    baseline: Baseline,
    warmup: int,
    shows: str,
    teacher: Teacher,
    update_rate: float,
    copy_every: int,
    plan: RolloutPlan,
    limits: tuple[Limit, ...],
    watch: tuple[Watch, ...] = (),
) -> Method:
    """REINFORCE on whitened rewards, with each token's size by the teacher's agreement and certainty.

    Args:
        gate: Gate by the teacher's entropy.
        bound: Bound of the agreement's magnitude.
        bonus: Bonus for short right completions.
        baseline: Mean and deviation that whiten the rewards.
        warmup: Batches of `running` before it has numbers of its own.
        shows: Column that the teacher sees.
        teacher: Model whose weights the teacher has.
        update_rate: Update rate of `ema`.
        copy_every: Optimizer steps between two copies of `hard_copy`.
        plan: Plan of the rollouts.
        limits: Methods that it collapses to.
        watch: Further curves.
    """
    shape = length_bonus(bonus)
    running = baseline == "running"
    advantage = running_advantage("rewards", shape) if running else group_advantage(shape=shape)
    size = directed_ratio(advantage, bound=bound)
    weights = {
        "ema": lambda: moving.ema(update_rate),
        "hard_copy": lambda: moving.hard_copy(copy_every),
    }.get(teacher, moving.frozen)()
    return Method(
        rollout=plan,
        views={"teacher": privileged(shows, model="teacher" if teacher == "outside" else "student", weights=weights)},
        terms=(Term("outcome", score_function(advantage), weight=both(size, gate.weight())),),
        controllers=(RunningRewards("rewards", warmup=warmup, shape=shape),) if running else (),
        limits=limits,
        recipe=_RECIPE,
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("log_ratio_size", log_ratio_size()),
            Watch("magnitude", size),
            Watch("gate", gate.weight()),
            *watch,
        ),
    )


#: Of 100 steps in the paper, which adapts low ranks (r 64, alpha 128, no dropout, all linear layers).
_RECIPE: dict[str, Any] = {
    "rollout": {"prompts": 32, "max_new_tokens": 1024, "thinking": True},
    "optimizer": {"learning_rate": 5e-6, "updates": 1, "grad_clip": 0.1},
    "eval": {"samples": 4, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 32768},
}
