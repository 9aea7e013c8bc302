"""What a run that learns from rubrics will ask its judge, before the first call."""

from __future__ import annotations

from retort.core.grading import RubricPlan
from retort.preflight.findings import Check
from retort.preflight.spending import Purpose, forecast, spending_check
from retort.train.setup.prepare import Prepared

__all__ = ["rubric_purposes", "rubric_spending"]

#: Tokens of the words around a document, of a rubric, and of the verdicts on one answer: as long as they usually are.
_WORDS, _RUBRIC, _VERDICT = 500, 700, 40


def rubric_purposes(
    plan: RubricPlan, *, samples: int, question: float, answer: float, visits: float = 1.0
) -> list[Purpose]:
    """What is asked about a group.

    Args:
        plan: The plan of the method.
        samples: Rollouts of a group.
        question: Tokens of a prompt.
        answer: Tokens of an answer, the student's or the teacher's.
        visits: How often a prompt is come to in the run, on average; the teacher answers it once.
    """
    pooled = plan.references + samples
    calls = -(-pooled // (plan.per_call or pooled))
    each = pooled / calls
    return [
        Purpose("reference", plan.references / max(1.0, visits), 0.0, question, answer),
        Purpose("rubric", 1.0, 0.0, _WORDS + question + pooled * answer, _RUBRIC),
        Purpose("verdicts", calls, 0.0, _WORDS + question + _RUBRIC + each * answer, each * _VERDICT),
    ]


def rubric_spending(prepared: Prepared) -> list[Check]:
    """The forecast of what a run's judge is asked, where the run learns from rubrics; its answers at full length."""
    plan, config, source = prepared.method.grading, prepared.config, prepared.source
    if plan is None or source.rubric_grader is None:
        return []
    samples, groups = prepared.method.rollout.samples, prepared.steps * source.count
    some = source.prompts[:64]
    question = sum(len(source.render(prompt)) for prompt in some) / len(some)
    visits = groups / len(source.prompts)
    asked = rubric_purposes(plan, samples=samples, question=question, answer=source.limit, visits=visits)
    prices = config.judge.prices
    found = forecast(groups, samples, asked, prices)
    who = str(config.judge.model or config.judge.replay)
    return [spending_check(found, config.judge.budget, prices, steps=prepared.steps, who=who)]
