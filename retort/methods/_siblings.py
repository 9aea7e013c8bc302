"""The parts that SDPO and multi-rollout OPD share: the loss towards a self-teacher that is shown siblings."""

from __future__ import annotations

from typing import Any, Literal

from retort import divergences
from retort.core.parts import Weight
from retort.divergences import Tail
from retort.errors import UserError
from retort.estimators import Estimator, pathwise
from retort.teachers import moving
from retort.weights import both, truncated_rollout_ratio, truncated_student_ratio

Divergence = Literal["jsd", "forward_kl", "reverse_kl"]
Teacher = Literal["ema", "trust_region", "frozen", "live", "outside"]


def disagreement(kind: Divergence, teacher_weight: float, top_k: int | None, tail: Tail) -> Estimator:
    """A divergence over the whole vocabulary, or over the student's top-k and what becomes of the rest.

    Args:
        kind: Kind of divergence.
        teacher_weight: Weight of the teacher in `jsd`.
        top_k: None for the whole vocabulary.
        tail: Treatment of the other ids, see `retort.divergences.topk_kl`.

    Raises:
        UserError: One id that is renormalised, which is always 1.
    """
    if top_k == 1 and tail == "renormalised":
        raise UserError(
            "method.top_k = 1: renormalised on one id both sides are 1; set method.tail=bucket, or raise it"
        )
    if kind == "jsd":
        whole = divergences.jsd(teacher_weight)
        return pathwise(whole if top_k is None else divergences.topk_jsd(teacher_weight, top_k, "student", tail))
    if top_k is None:
        return pathwise(divergences.forward_kl() if kind == "forward_kl" else divergences.reverse_kl())
    return pathwise(divergences.topk_kl("forward" if kind == "forward_kl" else "reverse", top_k, "student", tail))


def ratios(student_cap: float | None, engine_cap: float | None) -> Weight | None:
    """The weight of a token: its truncated ratio to the student before the batch, times that to the rollout engine.

    Args:
        student_cap: None for no such ratio.
        engine_cap: None for no such ratio.
    """
    student = None if student_cap is None else truncated_student_ratio(student_cap)
    engine = None if engine_cap is None else truncated_rollout_ratio(engine_cap)
    return both(student, engine) if student is not None and engine is not None else student or engine


def who(teacher: Teacher, update_rate: float) -> dict[str, Any]:
    """The `model` and `weights` of a view.

    Args:
        teacher: The student in one of its forms, or another model.
        update_rate: Update rate of `ema` and `trust_region`.
    """
    if teacher == "outside":
        return {"model": "teacher"}
    kinds = {
        "ema": lambda: moving.ema(update_rate),
        "trust_region": lambda: moving.trust_region(update_rate),
        "frozen": moving.frozen,
        "live": moving.live,
    }
    return {"model": "student", "weights": kinds[teacher]()}
