"""What models generate in a step beside the student's rollouts: texts that views show, and answers of a judge.

Forecasts of memory, calls and tokens are made from these numbers, which are known before the first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from retort.core.grading import RubricPlan
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.rollout.engines.hf import HFEngine
from retort.teachers.drafts import Draft
from retort.train.models.judge import asked_model
from retort.train.setup.prepare import Prepared

__all__ = ["GroupQuestion", "Writing", "question_tokens", "rubric_requests", "writings"]

#: Tokens of the words around a document, of a rubric, and of the verdicts on one answer: as long as they usually are.
_WORDS, _RUBRIC, _VERDICT = 500, 700, 40


@dataclass(frozen=True)
class Writing:
    """Texts of one kind by one model.

    Attributes:
        kind: In a word: `debate`, `rubric`, ...
        model: Name of the model in the run.
        lm: The model; None where it is in another process.
        texts: Texts in a step.
        at_once: How many of them can be generated at once, at most.
        prompt: Tokens of the longest prompt.
        longest: Tokens of the longest text.
    """

    kind: str
    model: str
    lm: LanguageModel | None = field(repr=False)
    texts: int
    at_once: int
    prompt: int
    longest: int


@dataclass(frozen=True)
class GroupQuestion:
    """A kind of question about a group of rollouts.

    Attributes:
        kind: In a word.
        calls: Calls about a group.
        prompt: Tokens that a call reads.
        usual: Tokens of an answer as long as they usually are.
        longest: Tokens of the longest answer.
    """

    kind: str
    calls: int
    prompt: float
    usual: float
    longest: int


def rubric_requests(
    plan: RubricPlan, *, samples: int, question: float, answer: float, reference: float | None = None
) -> list[GroupQuestion]:
    """What is asked about a group of rollouts: references, rubric, verdicts.

    Args:
        plan: The plan of the method.
        samples: Rollouts of a group.
        question: Tokens of a prompt.
        answer: Tokens of an answer of the student.
        reference: Of one of the teacher; None: as many.
    """
    reference = answer if reference is None else reference
    pooled, answers = plan.references + samples, plan.references * reference + samples * answer
    calls = -(-pooled // (plan.per_call or pooled))
    each = pooled / calls
    rubric, verdicts = _WORDS + question + answers, _WORDS + question + _RUBRIC + answers / calls
    return [
        GroupQuestion("reference", plan.references, question, reference, plan.reference_tokens),
        GroupQuestion("rubric", 1, rubric, _RUBRIC, plan.rubric_tokens),
        GroupQuestion("verdicts", calls, verdicts, each * _VERDICT, plan.verdict_tokens),
    ]


def question_tokens(prepared: Prepared) -> float:
    """Tokens of a prompt of the training data, the mean of some."""
    some = prepared.source.prompts[:64]
    return sum(len(prepared.source.render(prompt)) for prompt in some) / max(1, len(some))


def writings(prepared: Prepared) -> list[Writing]:
    """All that is generated in a step of a run beside the student's rollouts; its phases one after the other."""
    found = [own for _, phase in prepared.phases for own in _drafted(prepared, phase)]
    return list(dict.fromkeys(found)) + list(_judged(prepared))


def _drafted(prepared: Prepared, method: Method) -> Iterator[Writing]:
    """The texts that the views of a method show."""
    drafting = prepared.teachers.drafting
    if drafting is None:
        return
    question = round(question_tokens(prepared))
    for draft in dict.fromkeys(view.draft for view in method.views.values() if view.draft is not None):
        units = _units(prepared, method, draft)
        longest = draft.max_new_tokens or drafting.longest
        earlier = (draft.rounds - 1) * len(draft.authors) * longest
        shown = prepared.source.limit if draft.per == "rollout" else 0
        for author in dict.fromkeys(draft.authors):
            engine = drafting.drafters[author.model].engine
            # A longer prompt is cut, see `Drafting`.
            room = min(engine.context - min(longest, engine.context // 2), drafting.stage.longest or engine.context)
            yield Writing(
                kind=draft.name,
                model=author.model,
                lm=engine.lm if isinstance(engine, HFEngine) else None,
                texts=units * draft.rounds * draft.authors.count(author),
                at_once=units,
                prompt=min(question + earlier + shown, room),
                longest=longest,
            )


def _units(prepared: Prepared, method: Method, draft: Draft) -> int:
    """What is written about in a step: visits, rollouts, or turns of these."""
    visits = prepared.source.count
    if draft.per == "visit":
        return visits
    turns = (prepared.config.rollout.max_turns or 1) if draft.per == "step" else 1
    return visits * method.rollout.samples * turns


def _judged(prepared: Prepared) -> Iterator[Writing]:
    """What a judge of this process answers; one behind an address takes no memory here."""
    plan, judge = prepared.method.grading, asked_model(prepared.asker)
    if plan is None or judge is None:
        return
    visits, context = prepared.source.count, judge.context
    asked = rubric_requests(
        plan,
        samples=prepared.method.rollout.samples,
        question=question_tokens(prepared),
        answer=prepared.source.limit,
        reference=plan.reference_tokens,
    )
    for own in asked:
        prompt = min(round(own.prompt), context)
        room, texts = min(own.longest, context - prompt), visits * own.calls
        yield Writing(own.kind, str(prepared.config.judge.model), judge, texts, texts, prompt, room)
