"""What is asked of a rubricator and of a verifier that talk, and how their answers are read.

Every request holds one line of JSON, the document: texts of the teacher and of the student are strings in it and
nothing else, so that no text ends where its author says. `retort serve rules:...` reads the same documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from retort.chat import ChatRequest, Question, Unusable
from retort.chat.fence import as_json
from retort.core.grading import RubricPlan
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError, counted, quoted, shortened, visible
from retort.rewards.rubric import Rubric

RUBRIC, VERDICTS = "retort.rubric.v1", "retort.verdicts.v1"
#: Criteria of a rubric that a rubricator makes, at least and at most.
LEAST, MOST = 4, 12
#: What the criteria of such a rubric are about.
CATEGORIES = ("task", "quality", "reasoning")
#: Characters of the longest answer that is read.
MOST_TEXT = 1_000_000

Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Strict):
    """A turn of the question."""

    role: str
    content: str


class NumberedAnswer(_Strict):
    """An answer in the pool; its number says nothing of who gave it."""

    index: int = Field(ge=1)
    text: str


class RubricRequest(_Strict):
    """The document of a request for a rubric."""

    request: Literal["retort.rubric.v1"]
    question: list[Turn] = Field(min_length=1)
    teacher_answers: list[str]
    student_answers: list[str]


class VerdictsRequest(_Strict):
    """The document of a request for verdicts."""

    request: Literal["retort.verdicts.v1"]
    question: list[Turn] = Field(min_length=1)
    rubric: Rubric
    answers: list[NumberedAnswer] = Field(min_length=1)


class Verdict(BaseModel):
    """What a verifier found for one answer."""

    index: StrictInt
    judgement: list[StrictBool]
    final_score: StrictInt


class Verdicts(BaseModel):
    """What a verifier found for a pool of answers."""

    answers: list[Verdict]


@dataclass(frozen=True)
class Pooled:
    """An answer in the pool of a group.

    Attributes:
        source: Whose it is; a verifier never sees it.
        index: Its number among those of its source.
        text: What is judged of it.
    """

    source: Literal["teacher", "student"]
    index: int
    text: str


def graded_text(text: str) -> str:
    """The part of an answer that is judged: what follows the last `</think>`, or all where nothing follows it.

    Args:
        text: The whole answer.
    """
    _, found, after = text.rpartition("</think>")
    return after.strip() if found and after.strip() else text


def pool(group: str, teacher: Sequence[str], student: Sequence[str]) -> list[Pooled]:
    """All answers of a group, in an order that says nothing of who gave them, and is the same every time.

    Args:
        group: What tells the group from all others.
        teacher: The teacher's answers.
        student: The student's.
    """
    answers = [Pooled("teacher", index, text) for index, text in enumerate(teacher)]
    answers += [Pooled("student", index, text) for index, text in enumerate(student)]

    def place(own: Pooled) -> bytes:
        words = f"{group}|{own.source}|{own.index}|{own.text}"
        return hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()

    return sorted(answers, key=place)


def need_text(prompts: Sequence[Prompt]) -> None:
    """Refuses prompts of which a judge would read a part only: it is told texts.

    Raises:
        UserError: A prompt has an image, tools, or a turn that calls one.
    """
    for prompt in prompts:
        if prompt.images:
            raise UserError(
                f"row '{prompt.id}': it holds an image, which a judge does not see, so that it would grade by half of "
                "the question; leave such rows out, or choose a method whose teacher scores tokens"
            )
        if prompt.tools or any("tool_calls" in message.extra for message in prompt.messages):
            raise UserError(
                f"row '{prompt.id}': it has tools or calls of tools, which a judge is not told of, so that it would "
                "grade by half of the question; leave such rows out, or choose a method whose teacher scores tokens"
            )


def rubric_question(
    prompt: Prompt, teacher: Sequence[str], student: Sequence[str], plan: RubricPlan, template: str, seed: int
) -> Question[Rubric]:
    """Asks for the rubric of a group.

    Args:
        prompt: The question.
        teacher: The teacher's answers, each once.
        student: The student's answers.
        plan: The lengths and temperatures.
        template: The instructions, with the document's place.
        seed: Number that a model which can samples with.
    """
    document = RubricRequest(
        request=RUBRIC, question=_turns(prompt), teacher_answers=[*teacher], student_answers=[*student]
    )
    message = Message("user", template.replace("{text}", line_of(document)))
    request = ChatRequest(
        "rubric", (message,), plan.rubric_tokens, plan.rubric_temperature, seed=seed, schema=_rubric_schema()
    )
    return Question(request, read_rubric)


def verdicts_question(
    prompt: Prompt, rubric: Rubric, answers: Sequence[Pooled], plan: RubricPlan, template: str
) -> Question[list[list[bool]]]:
    """Asks which criteria hold for each of some answers, without saying whose they are.

    Args:
        prompt: The question.
        rubric: The rubric of the group.
        answers: In the order in which they are shown.
        plan: The lengths.
        template: The instructions, with the document's place.

    Returns:
        A question whose answer is, for each of `answers`, whether each criterion holds.
    """
    numbered = [NumberedAnswer(index=index, text=own.text) for index, own in enumerate(answers, 1)]
    document = VerdictsRequest(request=VERDICTS, question=_turns(prompt), rubric=rubric, answers=numbered)
    message = Message("user", template.replace("{text}", line_of(document)))
    schema = _verdicts_schema(len(answers), len(rubric.criteria))
    request = ChatRequest("verdicts", (message,), plan.verdict_tokens, 0.0, schema=schema)
    return Question(request, lambda text: read_verdicts(text, rubric, len(answers)))


def read_rubric(text: str) -> Rubric:
    """Reads a rubricator's answer.

    Raises:
        Unusable: It is no rubric of 4 to 12 criteria of the known categories.
    """
    rubric = _read(text, Rubric)
    if not LEAST <= len(rubric.criteria) <= MOST:
        raise Unusable(f"a rubric has {LEAST} to {MOST} criteria, not {len(rubric.criteria)}")
    other = next((own.category for own in rubric.criteria if own.category not in CATEGORIES), None)
    if other is not None:
        raise Unusable(f"a category is one of {', '.join(CATEGORIES)}, not {quoted(other, 40)}")
    return rubric


def read_verdicts(text: str, rubric: Rubric, count: int) -> list[list[bool]]:
    """Reads a verifier's answer: whether each criterion holds, for each of `count` answers.

    Raises:
        Unusable: An answer is missing or there twice, a verdict is missing, or a score is not the sum of its points.
    """
    found = _read(text, Verdicts).answers
    if [own.index for own in found] != list(range(1, count + 1)):
        raise Unusable(f"answers must have the indices 1 to {count}, in that order")
    for own in found:
        if len(own.judgement) != len(rubric.criteria):
            criteria = counted(len(rubric.criteria), "criterion", "criteria")
            raise Unusable(f"answer {own.index} has {len(own.judgement)} verdicts for {criteria}")
        if own.final_score != rubric.earned(own.judgement):
            raise Unusable(
                f"answer {own.index} has final_score {own.final_score}, and its criteria that hold have "
                f"{rubric.earned(own.judgement)} points"
            )
    return [own.judgement for own in found]


def line_of(document: BaseModel) -> str:
    """A document as one line of JSON, in which no character ends a line, hides, or is a control token."""
    return _json(document.model_dump())


def _json(value: Any) -> str:
    if isinstance(value, str):
        return as_json(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(name)}: {_json(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value)


def document_in(message: str) -> dict[str, Any] | None:
    """The document in a request; None where there is none.

    Raises:
        ValueError: There are several, or it is no JSON object.
    """
    lines = [line for line in message.split("\n") if line.startswith('{"request": "retort.')]
    if not lines:
        return None
    if len(lines) > 1:
        raise ValueError("a request has one document")
    found: Any = json.loads(lines[0])
    return found


def _turns(prompt: Prompt) -> list[Turn]:
    return [Turn(role=message.role, content=message.content) for message in prompt.messages]


def _read(text: str, kind: type[Model]) -> Model:
    """Reads a JSON object from an answer, which may stand in a fence, among words, or behind thoughts.

    Raises:
        Unusable: There is none, or it has another form.
    """
    text = text if text.lstrip().startswith("{") else graded_text(text)  # a draft among thoughts is no answer
    first, last = text.find("{"), text.rfind("}")
    if not 0 <= first < last or len(text) > MOST_TEXT:
        raise Unusable("the answer holds no JSON object")
    try:
        return kind.model_validate_json(text[first : last + 1])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise Unusable(visible(shortened(f"{where}: {problem['msg']}" if where else problem["msg"], 200))) from None


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _rubric_schema() -> dict[str, Any]:
    text, points = {"type": "string"}, {"type": "integer", "minimum": 1, "maximum": 5}
    criterion = _object({"id": text, "text": text, "category": {"enum": [*CATEGORIES]}, "points": points})
    criteria = {"type": "array", "items": criterion, "minItems": LEAST, "maxItems": MOST}
    return _object({"criteria": criteria, "maximum_score": {"type": "integer"}})


def _verdicts_schema(answers: int, criteria: int) -> dict[str, Any]:
    number = {"type": "integer"}
    judgement = {"type": "array", "items": {"type": "boolean"}, "minItems": criteria, "maxItems": criteria}
    one = _object({"index": number, "judgement": judgement, "final_score": number})
    return _object({"answers": {"type": "array", "items": one, "minItems": answers, "maxItems": answers}})
