"""What a run will have models write beside its rollouts: questions to a judge, and texts that teachers show."""

from __future__ import annotations

from retort.core.grading import RubricPlan
from retort.preflight.findings import Check
from retort.preflight.spending import Purpose, forecast, spending_check
from retort.train.setup.prepare import Prepared
from retort.train.setup.writing import question_tokens, rubric_requests, writings

__all__ = ["draft_checks", "rubric_purposes", "rubric_spending"]


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
    once, *others = rubric_requests(plan, samples=samples, question=question, answer=answer)
    return [
        Purpose(once.kind, once.calls / max(1.0, visits), 0.0, once.prompt, once.usual),
        *(Purpose(own.kind, own.calls, 0.0, own.prompt, own.usual) for own in others),
    ]


def rubric_spending(prepared: Prepared) -> list[Check]:
    """The forecast of what a run's judge is asked, where the run learns from rubrics; its answers at full length."""
    plan, config, source = prepared.method.grading, prepared.config, prepared.source
    if plan is None or source.rubric_grader is None:
        return []
    samples, groups = prepared.method.rollout.samples, prepared.steps * source.count
    question, visits = question_tokens(prepared), groups / len(source.prompts)
    asked = rubric_purposes(plan, samples=samples, question=question, answer=source.limit, visits=visits)
    prices = config.judge.prices
    found = forecast(groups, samples, asked, prices)
    who = str(config.judge.model or config.judge.replay)
    return [spending_check(found, config.judge.budget, prices, steps=prepared.steps, who=who)]


def draft_checks(prepared: Prepared) -> list[Check]:
    """How much models write in a step before the teachers score, for methods whose views show such texts."""
    kinds = {view.draft.name for view in prepared.method.views.values() if view.draft is not None}
    found = [own for own in writings(prepared) if own.kind in kinds]
    if not found:
        return []
    who = "; ".join(f"{own.kind}: {own.texts:,} by {own.model}, up to {own.longest:,} tokens each" for own in found)
    texts, tokens = sum(own.texts for own in found), sum(own.texts * own.longest for own in found)
    own = prepared.source.count * prepared.method.rollout.samples * prepared.source.limit
    return [
        Check(
            "texts before scoring",
            "ok",
            f"{texts:,} a step ({who}): up to {tokens / own:.3g} times the tokens of the student's rollouts",
            "they are generated in every step before a teacher scores, and take the time of as many rollouts",
            values=(("texts", float(texts)), ("tokens", float(tokens)), ("ratio", tokens / own)),
        )
    ]
