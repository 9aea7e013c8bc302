"""Whether the context of a judge of this process holds what it is asked about a group, and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retort.chat import ChatRequest
from retort.core.grading import RubricPlan
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.preflight.findings import Check
from retort.rewards.references import References
from retort.rewards.rubric import Criterion, Rubric
from retort.rewards.rubric_grader import RubricGrader
from retort.rewards.rubric_protocol import (
    CATEGORIES,
    LEAST,
    Pooled,
    Verdicts,
    line_of,
    rubric_question,
    verdicts_question,
)
from retort.rollout.chat import LocalChat
from retort.teachers.templates import templates
from retort.train.setup.prepare import Prepared

__all__ = ["Needed", "rubric_context"]

_NAME = "context of the judge"
_WHY = "nothing is learnt from a group of which one request, or the answer to it, does not fit into the context"
#: What each kind of question asks for.
_WANTED = {"reference": "an answer of the teacher", "rubric": "a rubric", "verdicts": "verdicts"}
#: What makes its shortest request shorter.
_SHORTER = {
    "reference": "leave out the long prompts",
    "rubric": "lower method.samples",
    "verdicts": "lower method.per_call",
}
_LOWER = (
    "groups that do not fit are not learnt from: lower rollout.max_new_tokens, method.reference_tokens, "
    "method.rubric_tokens or method.verdict_tokens, or name a judge that reads more"
)


@dataclass(frozen=True)
class Needed:
    """Tokens that one kind of question takes of the judge's context, each with its answer.

    Attributes:
        kind: `reference`, `rubric` or `verdicts`.
        least: Where the prompt is the shortest of the data, the completions are empty, and all that is written is as
            short as it may be.
        most: Where the prompt is the longest, and all that is generated has its full length; about that many, because
            the student's tokens are counted as the judge's, and JSON escapes some.
    """

    kind: str
    least: int
    most: int


def rubric_context(prepared: Prepared) -> list[Check]:
    """Compares the context with the shortest and the longest that a run may ask; nothing is generated.

    Args:
        prepared: The parts of the run.

    Returns:
        One finding: `fatal` where not even the shortest question fits, `warn` where the longest does not. None at all
        where no judge is asked, or one at an address, of which the context is not known.
    """
    plan, grader = prepared.method.grading, prepared.source.rubric_grader
    judge = None if prepared.asker is None else prepared.asker.model
    if plan is None or not isinstance(grader, RubricGrader) or not isinstance(judge, LocalChat):
        return []
    try:
        found = _needed(prepared, plan, grader.references, judge)
    except UserError as error:
        return [Check(_NAME, "warn", f"not known, as a request cannot be rendered: {error}", _WHY)]
    context = judge.engine.context
    who, values = f"{prepared.config.judge.model}: its context of {context:,} tokens", (("context", float(context)),)
    values += tuple((f"{own.kind}/{name}", float(getattr(own, name))) for own in found for name in ("least", "most"))
    short, long = max(found, key=lambda own: own.least), max(found, key=lambda own: own.most)
    least = f"the shortest for {_WANTED[short.kind]} takes {short.least:,} with its answer"
    most = f"the longest, for {_WANTED[long.kind]}, about {long.most:,}"
    if short.least > context:
        saw, remedy = f"{who} holds no request: {least}", f"name a judge that reads more, or {_SHORTER[short.kind]}"
        return [Check(_NAME, "fatal", saw, _WHY, remedy, values)]
    if long.most > context:
        saw, remedy = f"{who} holds short requests only: {least}, {most}", _LOWER
        return [Check(_NAME, "warn", saw, _WHY, remedy, values)]
    saw = f"{who} holds every request and its answer: {most}"
    return [Check(_NAME, "ok", saw, _WHY, values=values)]


def _needed(prepared: Prepared, plan: RubricPlan, references: References, judge: LocalChat) -> list[Needed]:
    """What each kind of question takes."""

    def size(prompt: Prompt) -> int:
        texts = [*(message.content for message in prompt.messages), *(references.known(prompt) or ())]
        return sum(map(len, texts))

    prompts = sorted(prepared.source.prompts, key=size)
    asked = _Asked(plan, judge, templates(prepared.config.templates))
    samples, limit = prepared.method.rollout.samples, prepared.source.limit
    least = asked.least(prompts[0], _lengths(asked, references, prompts[0]), samples)
    most = asked.most(prompts[-1], _lengths(asked, references, prompts[-1]), [limit] * samples)
    return [Needed(kind, least[kind], most[kind]) for kind in least if kind in most]


def _lengths(asked: _Asked, references: References, prompt: Prompt) -> list[int] | None:
    known = references.known(prompt)
    return None if known is None else [asked.tokens(text) for text in known]


@dataclass(frozen=True)
class _Asked:
    """What is asked about a group, with texts of given lengths in tokens."""

    plan: RubricPlan
    judge: LocalChat
    templates: Mapping[str, str]

    def tokens(self, text: str) -> int:
        """Length of a text of the judge's."""
        return len(self.judge.engine.tokenizer.encode(text, add_special_tokens=False))

    def least(self, prompt: Prompt, known: list[int] | None, samples: int) -> dict[str, int]:
        """The shortest question of each kind, with the shortest answer that can be read and its stop token.

        Args:
            prompt: The prompt.
            known: Lengths of the teacher's answers; None: they are asked for.
            samples: Rollouts of a group.
        """
        answers = sorted([*(known or [1]), *[0] * samples])
        size = min(self.plan.per_call or len(answers), len(answers))
        # Whatever the order, some call has the longest answer.
        call = [*answers[: size - 1], answers[-1]]
        one = {"index": 1, "judgement": [False] * LEAST, "final_score": 0}
        verdicts = Verdicts.model_validate({"answers": [one] * size})
        found = {} if known else {"reference": self._reference(prompt) + 1}
        found["rubric"] = self._rubric(prompt, len(answers)) + sum(answers) + self.tokens(line_of(_SHORTEST))
        found["verdicts"] = self._verdicts(prompt, size) + sum(call) + self.tokens(line_of(verdicts))
        return {kind: own + 1 for kind, own in found.items()}

    def most(self, prompt: Prompt, known: list[int] | None, student: list[int]) -> dict[str, int]:
        """The longest question of each kind, with the longest answer that is asked for.

        Args:
            prompt: The prompt.
            known: Lengths of the teacher's answers; None: they are asked for.
            student: Lengths of the longest completions.
        """
        plan = self.plan
        answers = sorted([*(known or [plan.reference_tokens] * plan.references), *student], reverse=True)
        size = min(plan.per_call or len(answers), len(answers))
        found = {} if known else {"reference": self._reference(prompt) + plan.reference_tokens}
        found["rubric"] = self._rubric(prompt, len(answers)) + sum(answers) + plan.rubric_tokens
        rubric = max(0, plan.rubric_tokens - self.tokens(line_of(_SHORTEST)))
        found["verdicts"] = self._verdicts(prompt, size) + rubric + sum(answers[:size]) + plan.verdict_tokens
        return found

    def _reference(self, prompt: Prompt) -> int:
        return self.judge.length(ChatRequest("reference", prompt.messages, 1))

    def _rubric(self, prompt: Prompt, count: int) -> int:
        asked = rubric_question(prompt, [""], [""] * (count - 1), self.plan, self.templates["rubric"], 0)
        return self.judge.length(asked.request)

    def _verdicts(self, prompt: Prompt, count: int) -> int:
        answers = [Pooled("student", index, "") for index in range(count)]
        asked = verdicts_question(prompt, _SHORTEST, answers, self.plan, self.templates["verdicts"])
        return self.judge.length(asked.request)


#: The shortest rubric that is read.
_SHORTEST = Rubric(
    criteria=[Criterion(id=str(number), text="1", category=CATEGORIES[0], points=1) for number in range(LEAST)],
    maximum_score=LEAST,
)
