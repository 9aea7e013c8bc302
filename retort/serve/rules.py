"""A judge by rules for a built-in task: a server of chat completions that decides by code, and knows no model.

It speaks what a judge of a run is asked (`retort.rewards.rubric_protocol`), so the whole path of such a run can be
tried on a small machine, with verdicts that are right. It reads nothing but the one document of a request; texts in
that are strings to be checked, whatever they claim to be.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import retort
from retort.errors import UserError, did_you_mean, shortened, visible
from retort.rewards.rubric import Criterion, Rubric
from retort.rewards.rubric_protocol import (
    RUBRIC,
    VERDICTS,
    RubricRequest,
    Turn,
    Verdict,
    Verdicts,
    VerdictsRequest,
    document_in,
)
from retort.tasks.countdown import rules as countdown

#: Bytes of the largest request.
_MOST_BYTES = 8 * 2**20
#: What a model's name begins with that is served by rules.
PREFIX = "rules:"


@dataclass(frozen=True)
class Rules:
    """What is known by rule of a task.

    Attributes:
        criteria: Id, words, category and points of each criterion.
        problem: Reads the problem of a prompt's text; None if it states none.
        verdicts: Whether each criterion holds for an answer to a problem.
        answer: A right answer to a problem, by a seed; empty where there is none.
    """

    criteria: tuple[tuple[str, str, str, int], ...]
    problem: Callable[[str], Any]
    verdicts: Callable[[Any, str], list[bool]]
    answer: Callable[[Any, int], str]


RULES: Mapping[str, Rules] = {
    "countdown": Rules(countdown.CRITERIA, countdown.problem_of, countdown.verdicts, countdown.answer)
}


class Spoken(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class _Asked(BaseModel):
    """What is read of a request for a chat completion; all else that clients send is about models."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: Annotated[list[Spoken], Field(min_length=1)]
    seed: int | None = None


def rules_of(name: str) -> Rules:
    """The rules of a task, by the name that `retort serve` is given, such as `rules:countdown`.

    Raises:
        UserError: There are none for this task.
    """
    task = name.removeprefix(PREFIX)
    if task not in RULES:
        raise UserError(f"{name}: there is no judge by rules for '{task}'; {did_you_mean(task, RULES)}")
    return RULES[task]


def reply(rules: Rules, messages: list[Spoken], seed: int) -> str:
    """What the judge says in a conversation: a rubric, verdicts, or a right answer to a problem.

    Args:
        rules: Those of the task.
        messages: The conversation. What follows the first turn of the user asks again, and changes nothing.
        seed: Chooses among right answers.

    Raises:
        UserError: The document is none of those that are known, or its question is no problem of the task.
    """
    asked = next((message.content for message in messages if message.role == "user"), "")
    try:
        document = document_in(asked)
        if document is None:
            return rules.answer(_problem(rules, [Turn(role="user", content=asked)]), seed)
        kind: Any = document.get("request") if isinstance(document, dict) else None
        if kind == RUBRIC:
            return _rubric(rules, RubricRequest.model_validate(document, strict=True))
        if kind == VERDICTS:
            return _verdicts(rules, VerdictsRequest.model_validate(document, strict=True))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"the document is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the document cannot be read") from None
    raise UserError("the document is of no kind that is known here")


def application(name: str, rules: Rules, *, key: str = "") -> Any:
    """The application of a judge by rules, for `uvicorn`.

    Args:
        name: The model's name in requests, such as `rules:countdown`.
        rules: What is known of the task.
        key: Bearer token that every request but `/health` must bring; empty: none.

    Raises:
        UserError: The extra `serve` is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
    except ImportError as error:
        raise UserError(f"retort serve needs the package '{error.name}': pip install 'retort-distill[serve]'") from None

    app = FastAPI(title="retort serve", version=retort.__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def keyed(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "")
        allowed = not key or hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode())
        if not allowed and request.url.path != "/health":
            return _refusal(401, "a key is needed")
        return await go_on(request)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": retort.__version__}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "retort"}]}

    async def completions(request: Request) -> Response:
        return await _completion(request, name, rules)

    health.__annotations__ = models.__annotations__ = {}
    completions.__annotations__ = {"request": Request, "return": Response}  # those here are names of this function
    app.get("/health")(health)
    app.get("/v1/models")(models)
    app.post("/v1/chat/completions")(completions)
    return app


async def _completion(request: Any, name: str, rules: Rules) -> Any:
    """The answer to a request for a chat completion, or its refusal."""
    from fastapi.responses import JSONResponse

    if request.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
        return _refusal(415, "the body is application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            return _refusal(413, f"a request has at most {_MOST_BYTES} bytes")
    try:
        asked = _Asked.model_validate_json(bytes(body))
        if asked.model != name:
            return _refusal(404, f"there is no model '{asked.model}'; this server has '{name}'")
        text = reply(rules, asked.messages, asked.seed or 0)
    except ValidationError:
        return _refusal(400, "the body is no request for a chat completion with texts as messages")
    except UserError as error:
        return _refusal(400, str(error))
    read = sum(len(message.content.split()) for message in asked.messages)
    usage = {"prompt_tokens": read, "completion_tokens": len(text.split())}
    return JSONResponse(
        {
            "id": "chatcmpl-rules",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
    )


def _problem(rules: Rules, question: list[Turn]) -> Any:
    found = rules.problem(question[-1].content)
    if found is None:
        raise UserError(f"this is no problem of the task: {shortened(question[-1].content, 100)!r}")
    return found


def _rubric(rules: Rules, asked: RubricRequest) -> str:
    """The task's rubric: it does not depend on the answers."""
    _problem(rules, asked.question)
    return _whole_rubric(rules).model_dump_json()


def _whole_rubric(rules: Rules) -> Rubric:
    criteria = [
        Criterion(id=name, text=text, category=category, points=points)
        for name, text, category, points in rules.criteria
    ]
    return Rubric(criteria=criteria, maximum_score=sum(criterion.points for criterion in criteria))


def _verdicts(rules: Rules, asked: VerdictsRequest) -> str:
    """Checks each answer by code, for the criteria that this judge knows; a rubric with others is refused."""
    problem = _problem(rules, asked.question)
    known = {criterion.id: (place, criterion) for place, criterion in enumerate(_whole_rubric(rules).criteria)}
    for criterion in asked.rubric.criteria:
        if criterion.id not in known or known[criterion.id][1].text != criterion.text:
            raise UserError(f"criterion '{criterion.id}' is none that can be checked by rule")
    places = [known[criterion.id][0] for criterion in asked.rubric.criteria]
    found: list[Verdict] = []
    for own in asked.answers:
        holds = rules.verdicts(problem, own.text)
        judgement = [holds[place] for place in places]
        found.append(Verdict(index=own.index, judgement=judgement, final_score=asked.rubric.earned(judgement)))
    return Verdicts(answers=found).model_dump_json()


def _refusal(status: int, text: str) -> Any:
    """An answer that says on one line why there is no other, in the form of such servers."""
    from fastapi import Response

    body = json.dumps({"error": {"message": visible(shortened(text, 500)), "type": "invalid_request_error"}})
    return Response(body, status, media_type="application/json")
