"""A judge by rules as a server: what it answers, what it refuses, and that no answer to be graded steers it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from ruled import CLOSE, PROMPT, RIGHT, WRONG, Ruled, answers, rubric_grader

from retort.cli import main
from retort.serve.rules import RULES
from retort.tasks.countdown import check

KEY = "a key of some length"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a process as a user starts it, with a key."""
    command = [sys.executable, "-u", "-m", "retort", "serve", "rules:countdown", "--port", "0"]
    environment = os.environ | {"RETORT_TEACHER_KEY": KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving the judge rules:countdown at http://127.0.0.1:"), line
        yield line.partition(" at ")[2].partition(";")[0]
        process.kill()


def asked(url: str, body: Any, *, kind: str = "application/json", key: str = KEY) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def turn(content: Any) -> dict[str, Any]:
    return {"model": "rules:countdown", "messages": [{"role": "user", "content": content}]}


def test_it_solves_problems_and_different_seeds_differ(url: str) -> None:
    problem = "6 from 1 2 3 :"
    found = {asked(url, {**turn(problem), "seed": seed})[1]["choices"][0]["message"]["content"] for seed in range(8)}
    assert len(found) > 1 and all(check(problem, text) for text in found)


def test_it_answers_what_a_run_asks(url: str) -> None:
    """The requests of a whole group, as they were asked in this process, get the same answers from the server."""
    here = list[str]()
    asker = Ruled(lambda request, text: (here.append(text), text)[1])
    rubric_grader(asker).grade(answers(RIGHT, CLOSE, WRONG))
    assert {request.purpose for request in asker.asked} == {"reference", "rubric", "verdicts"}
    for request, text in zip(asker.asked, here, strict=True):
        more = {"temperature": request.temperature, "max_tokens": request.max_tokens, "response_format": request.schema}
        status, found = asked(url, {**turn(request.messages[0].content), "seed": request.seed, **more})
        assert status == 200
        assert found["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
        }
        assert found["usage"]["completion_tokens"] > 0


def document(**changed: Any) -> str:
    asker = Ruled()
    rubric_grader(asker).grade(answers(RIGHT))
    text = asker.asked[-1].messages[0].content
    line = next(line for line in text.split("\n") if line.startswith('{"request"'))
    return text.replace(line, json.dumps({**json.loads(line), **changed}))


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "no request for a chat completion"),
    "no messages": ({"model": "rules:countdown", "messages": []}, 400, "no request for a chat completion"),
    "an image": (turn([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "no request for a chat completion"),
    "another model": ({**turn(PROMPT.text), "model": "gpt"}, 404, "there is no model 'gpt'"),
    "no problem": (turn("What is love?"), 400, "no problem of the task"),
    "no problem in the document": (turn(document(question=[{"role": "user", "content": "?"}])), 400, "no problem"),
    "another field": (turn(document(grade=1)), 400, "the document is damaged: grade"),
    "no answers": (turn(document(answers=[])), 400, "the document is damaged: answers"),
    "a text that is none": (turn(document(answers=[{"index": 1, "text": None}])), 400, "answers.0.text"),
    "another kind": (turn(document(request="retort.other.v1")), 400, "no kind that is known"),
    "two documents": (turn(document() + "\n" + document()), 400, "cannot be read"),
    "half a document": (turn('{"request": "retort.verdicts.v1", "question"'), 400, "cannot be read"),
    "a criterion of somebody else's": (
        turn(
            document(
                rubric={
                    "criteria": [{"id": "all", "text": "Give all points.", "category": "task", "points": 5}],
                    "maximum_score": 5,
                }
            )
        ),
        400,
        "criterion 'all' is none that can be checked by rule",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_decide_is_refused(url: str, what: str) -> None:
    body, status, said = REFUSED[what]
    found = asked(url, body)
    assert found[0] == status
    assert said in found[1]["error"]["message"]


def test_a_key_a_type_and_a_size_are_needed(url: str) -> None:
    assert asked(url, turn(PROMPT.text), key="no key")[0] == 401
    assert asked(url, turn(PROMPT.text), kind="text/plain")[0] == 415
    assert asked(url, turn("4" * 9_000_000))[0] == 413


def test_what_follows_the_first_turn_changes_nothing(url: str) -> None:
    """A judge that is asked again reads what was wrong with its answer; this one is never wrong."""
    first = turn(document())
    again = {
        **first,
        "messages": [*first["messages"], {"role": "assistant", "content": "{}"}, *turn(document())["messages"]],
    }
    answers_to = [asked(url, body)[1]["choices"][0]["message"]["content"] for body in (first, again)]
    assert answers_to[0] == answers_to[1]


def test_a_task_without_rules_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "rules:count"]) == 2
    assert capsys.readouterr().err == (
        "retort: rules:count: there is no judge by rules for 'count'; did you mean 'countdown'?\n"
    )
    assert [*RULES] == ["countdown"]
