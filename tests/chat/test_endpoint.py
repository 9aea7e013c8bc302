"""A server of chat completions that misbehaves on purpose, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chatting import MODEL, ChatServer, answer_to

from retort.chat import ChatReply, ChatRequest, Failure
from retort.chat.endpoint import ChatEndpoint
from retort.core.rollouts import Message
from retort.errors import UnreachableError, UserError

SCHEMA = {"type": "object", "properties": {"digest": {"type": "string"}}}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    made = ChatServer(tmp_path_factory.mktemp("server"))
    yield made
    made.end()


@pytest.fixture
def server(process: ChatServer) -> ChatServer:
    process.fails()
    return process


def endpoint(server: ChatServer, **more: Any) -> ChatEndpoint:
    return ChatEndpoint(server.url, **{"model": MODEL, "patience": 5, "timeout": 20, **more})


def request(text: str = "4 + 4 =", **more: Any) -> ChatRequest:
    return ChatRequest("sum", (Message("system", "Add."), Message("user", text)), **{"max_tokens": 32, **more})


def right(text: str = "4 + 4 =") -> str:
    return answer_to([{"content": text}])


def test_what_is_sent_and_what_comes_back(server: ChatServer) -> None:
    one = request(temperature=0.5, seed=3, schema=SCHEMA)
    assert endpoint(server).chat([one]) == [ChatReply(right(), 7, 3)]
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "4 + 4 ="}]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["seed"]) == (MODEL, 32, 0.5, 3)
    assert asked["response_format"]["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize("fault", ["429", "500", "503", "refuse", "page"])
def test_what_may_pass_is_tried_again(server: ChatServer, fault: str) -> None:
    server.fails(fault)
    assert endpoint(server).chat([request()]) == [ChatReply(right(), 7, 3)]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "http"),
        ("500", "http"),
        ("page", "http"),
        ("shape", "http"),
        ("413", "http"),
        ("slow", "timeout"),
        ("refuse", "unreachable"),
        ("filter", "refused"),
        ("refusal", "refused"),
    ],
)
def test_a_failure_is_a_value_with_its_reason(server: ChatServer, fault: str, reason: str) -> None:
    server.fails(fault)
    failed, answer = endpoint(server, patience=0, timeout=1.5 if fault == "slow" else 20, requests=1).chat(
        [request(), request("1")]
    )
    assert isinstance(failed, Failure)
    assert failed.reason == reason
    assert failed.message.isprintable(), "one line, with nothing that a terminal obeys"
    assert answer == ChatReply(right("1"), 7, 3), "a failure ends nothing but its own request"


def test_a_refusal_costs_what_the_server_counts(server: ChatServer) -> None:
    server.fails("filter")
    (failed,) = endpoint(server).chat([request()])
    assert (failed.prompt_tokens, failed.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("fault", "reply"),
    [
        ("cut", ChatReply(right()[:5], 7, 3, ended=False)),
        ("empty", ChatReply("", 7, 3)),
        ("french", ChatReply("Voilà ma réponse.", 7, 3)),
        ("parts", ChatReply(right(), 7, 3)),
    ],
)
def test_an_odd_answer_is_passed_on_as_it_is(server: ChatServer, fault: str, reply: ChatReply) -> None:
    server.fails(fault)
    assert endpoint(server).chat([request()]) == [reply]


def test_tokens_that_are_not_counted_are_taken_for_more_than_they_can_be(server: ChatServer) -> None:
    server.fails("uncounted")
    (answer,) = endpoint(server).chat([request()])
    assert (answer.prompt_tokens, answer.completion_tokens) == (len("Add.4 + 4 ="), len(right()))


@pytest.mark.parametrize("quietly", [False, True])
@pytest.mark.parametrize("refused", ["response_format", "max_tokens", "temperature", "seed"])
def test_an_option_that_a_server_does_not_take_is_left_out_once_and_for_all(
    server: ChatServer, refused: str, quietly: bool
) -> None:
    server.fails(refuses=f"{refused} quietly" if quietly else refused)
    model, notes = endpoint(server), list[str]()
    model.listen(notes.append)
    assert model.chat([request(schema=SCHEMA), request("1", schema=SCHEMA)]) == [
        ChatReply(right(), 7, 3),
        ChatReply(right("1"), 7, 3),
    ]
    assert (len(server.asked) == 3) or quietly, "named, it is found at once"
    assert len(notes) == 1
    assert ("a JSON schema" if refused == "response_format" else refused) in notes[0]
    limit = "max_completion_tokens" if refused == "max_tokens" else "max_tokens"
    assert server.asked[-1][limit] == 32
    kept = {"response_format", "max_tokens", "temperature", "seed"} - {refused}
    assert kept <= server.asked[-1].keys()
    count = len(server.asked)
    model.chat([request("2", schema=SCHEMA)])
    assert len(server.asked) == count + 1, "what was found out is remembered"
    assert len(notes) == 1


def test_two_options_that_are_named_one_after_the_other(server: ChatServer) -> None:
    server.fails(refuses="max_tokens temperature")
    assert endpoint(server).chat([request()]) == [ChatReply(right(), 7, 3)]
    assert len(server.asked) == 3


def test_a_request_that_is_refused_in_every_form_is_one_failure(server: ChatServer) -> None:
    server.fails(refuses="messages")
    (failed,) = endpoint(server).chat([request(schema=SCHEMA)])
    assert isinstance(failed, Failure)
    assert failed.reason == "http"
    server.fails(refuses="messages")
    model = endpoint(server)
    server.fails()
    model.chat([request()])
    server.fails(refuses="messages")
    assert isinstance(model.chat([request("2")])[0], Failure)
    assert len(server.asked) == 1, "options that it took before are not to blame"


def test_the_name_of_the_only_model_is_asked_for(server: ChatServer) -> None:
    model = endpoint(server, model=None)
    model.check()
    assert model.model == MODEL
    assert model.fingerprint == endpoint(server).fingerprint
    assert model.name == f"{MODEL} at {server.url}/v1"
    assert server.asked == []


def test_of_several_models_one_has_to_be_named(server: ChatServer) -> None:
    server.fails(models="a b")
    with pytest.raises(UserError, match="2 models"):
        endpoint(server, model=None).check()


def test_a_model_that_does_not_exist_is_refused_at_the_start_in_one_line(server: ChatServer) -> None:
    with pytest.raises(UserError, match=f"'gone'.*{MODEL}.*judge.name") as found:
        endpoint(server, model="gone").check()
    assert "\n" not in str(found.value)
    endpoint(server, model="unlisted").check()  # some have names that they do not list


def test_what_only_the_user_can_mend_is_an_error(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret-123")
    server.fails("401")
    heard = list[int]()
    with pytest.raises(UserError, match="MY_KEY") as found:
        endpoint(server, key_variable="MY_KEY", requests=1).chat(
            [request(), request("1")], lambda n, _: heard.append(n)
        )
    assert "sk-very" not in str(found.value), "even where the server repeats it"
    with pytest.raises(UserError, match="does not exist"):
        endpoint(server, model="gone").chat([request()])


def test_a_key_is_in_no_answer(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_JUDGE_KEY", "sk-very-secret-123")
    server.fails("key")
    (answer,) = endpoint(server).chat([request()])
    assert isinstance(answer, ChatReply)
    assert "sk-very" not in answer.text
    assert "RETORT_JUDGE_KEY" in answer.text


def test_after_failures_in_a_row_the_rest_is_not_asked(server: ChatServer) -> None:
    server.fails(*["500"] * 6)
    model = endpoint(server, patience=0, requests=1)
    found = model.chat([request(str(n)) for n in range(9)])
    assert [isinstance(answer, Failure) for answer in found] == [True] * 9
    assert len(server.asked) == 5
    assert [answer.asked for answer in found if isinstance(answer, Failure)] == [True] * 5 + [False] * 4
    model.client.patience = 60
    assert isinstance(model.chat([request()])[0], Failure), "the next batch begins with one attempt"
    assert len(server.asked) == 6
    assert [type(answer) for answer in model.chat([request(), request("1")])] == [ChatReply] * 2, "and it is back"


def test_answers_that_came_before_an_error_are_heard(server: ChatServer) -> None:
    server.fails("-", "402")
    heard = list[int]()
    with pytest.raises(UserError, match="402"):
        endpoint(server, requests=1).chat([request(), request("1")], lambda number, _: heard.append(number))
    assert heard == [0]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/v1/", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/v1/chat/completions", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/api/openai", "http://127.0.0.1:1/api/openai"),
    ],
)
def test_an_address_is_taken_in_the_forms_that_pages_show(url: str, base: str) -> None:
    assert ChatEndpoint(url, model="m").client.url == base


def test_nobody_there_is_one_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    gone = ChatServer(tmp_path_factory.mktemp("gone"))
    gone.end()
    model = endpoint(gone, patience=0)
    with pytest.raises(UnreachableError, match=str(gone.port)):
        model.check()
    (failed,) = model.chat([request()])
    assert isinstance(failed, Failure)
    assert failed.reason == "unreachable"
