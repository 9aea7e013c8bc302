"""A first phase of learning from given answers, in front of any method."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from retort.divergences import forward_kl, negative_log_likelihood
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Method, Paper, Term, Watch
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import live
from retort.teachers.view import View

PAPER = Paper(
    title="Rethinking On-Policy Distillation of LLMs: Phenomenology, Mechanism, and Recipe",
    authors="Li, Yaxuan and Zuo, Yuxin and He, Bingxiang and others",
    year=2026,
    arxiv="2604.13016",
)


def with_cold_start(
    method: Method,
    steps: int,
    *,
    loss: Literal["sft", "forward_kl"] = "sft",
    answers: Literal["teacher", "dataset"] = "teacher",
    attempts: int | None = 3,
    temperature: float = 1.0,
) -> Method:
    r"""The method after an off-policy cold start: first so many steps on answers that the student did not write.

    Repair A of arXiv 2604.13016 for a student that begins too far from its teacher: fine-tuning on the teacher's
    answers, then on-policy distillation on other prompts (a run goes on through its data, so the prompts are others
    until it comes round). The method's own schedules begin after these steps, and so do the learning rate's schedule
    and the optimizer's moments, as in two trainings one after the other. Of the paper's filter of invalid answers, only
    those that came to no end are left out.

    Args:
        method: What is run afterwards.
        steps: Batches of the cold start, out of the run's.
        loss: `sft`, the negative log-likelihood of what was written (the paper), or the exact `forward_kl` at each of
            its tokens.
        answers: The teacher's, written as the run goes, once per prompt; or the `response` column of the data.
        attempts: How often the teacher may begin again where it came to no end (paper: 3); None: cut answers are used.
        temperature: Of the teacher's sampling.

    Raises:
        UserError: `steps` below 1.
    """
    if steps < 1:
        raise UserError(f"a cold start has at least 1 step, not {steps}")
    chosen = negative_log_likelihood() if loss == "sft" else forward_kl()
    # A student that teaches itself may learn the data's answers first, of which nobody is asked anything.
    alone = loss == "sft" and answers == "dataset" and all(view.model != "teacher" for view in method.views.values())
    view = View(model="student", weights=live()) if alone else View.same_prompt()
    first = Method(
        name=f"cold_start_{loss}",
        paper=PAPER,
        status="faithful" if loss == "sft" else "reconstructed",
        rollout=RolloutPlan(
            on_policy_fraction=0.0,
            off_policy=answers,
            temperature=temperature,
            keep=answers == "teacher",
            attempts=attempts if answers == "teacher" else None,
        ),
        terms=(Term(loss, pathwise(chosen)),),
        views={"teacher": view},
        watch=(Watch("student_entropy", student_entropy()),),
    )
    return replace(method, before=(steps, first))
