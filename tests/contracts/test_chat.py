"""What every model that talks must hold: order, repetition, limits, and no exception because of one request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import ChatServer

from retort.align.chat import Renderer
from retort.chat import ChatModel, ChatReply, ChatRequest, Failure
from retort.chat.asking import Asking
from retort.chat.endpoint import ChatEndpoint
from retort.core.rollouts import Message
from retort.models.load import load_model
from retort.rollout.chat import LocalChat
from retort.rollout.engines.hf import HFEngine

ROOM = 12


def endpoint(until: ExitStack, tmp: Path, model_folder: Callable[..., Path]) -> ChatModel:
    server = ChatServer(tmp)
    until.callback(server.end)
    model = ChatEndpoint(server.url, patience=5, timeout=20)
    model.check()
    return model


def local(until: ExitStack, tmp: Path, model_folder: Callable[..., Path]) -> ChatModel:
    stops = list(range(2, 58, 9))
    lm: Any = load_model(
        str(model_folder(seed=5)), role="judge", precision="fp32", device=torch.device("cpu"), stop=stops
    )
    engine = HFEngine(lm, vocab=58, max_parallel=3)
    return LocalChat(engine, Renderer(lm.tokenizer), name="tiny", fingerprint="tiny 5", batch=4)


MODELS: dict[str, Callable[..., ChatModel]] = {"behind a server": endpoint, "in this process": local}


@pytest.fixture(scope="module", params=list(MODELS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> Iterator[ChatModel]:
    with ExitStack() as until:
        yield MODELS[request.param](until, tmp_path_factory.mktemp("chat"), model_folder)


def requests(count: int = 6) -> list[ChatRequest]:
    """Different ones, also in temperature, limit and seed."""
    return [
        ChatRequest("sum", (Message("user", f"{n} + {n} ="),), ROOM - n % 3, temperature=float(n % 2), seed=n)
        for n in range(count)
    ]


def test_every_request_is_answered_in_order_and_alone(model: ChatModel) -> None:
    asked = requests()
    together = model.chat(asked)
    assert all(isinstance(answer, ChatReply) for answer in together)
    assert len({answer.text for answer in together}) > 1  # type: ignore[union-attr]
    assert model.chat(asked[::-1]) == together[::-1], "neither neighbours nor order matter, and it says the same again"
    assert [model.chat([one])[0] for one in asked] == together


def test_answers_are_heard_once_each(model: ChatModel) -> None:
    heard: list[tuple[int, Any]] = []
    found = model.chat(requests(), lambda number, answer: heard.append((number, answer)))
    assert sorted(number for number, _ in heard) == list(range(6))
    assert all(found[number] == answer for number, answer in heard)
    assert model.chat([]) == []


def test_tokens_are_counted(model: ChatModel) -> None:
    for answer in model.chat(requests()):
        assert isinstance(answer, ChatReply)
        assert answer.prompt_tokens > 0
        assert 0 < answer.completion_tokens <= ROOM


def test_the_fingerprint_is_of_the_model_and_stays(model: ChatModel) -> None:
    before = model.fingerprint
    model.chat(requests(2))
    assert model.fingerprint == before
    assert before
    assert "\n" not in model.name


def test_a_schema_that_cannot_be_enforced_is_no_reason_to_fail(model: ChatModel) -> None:
    schema = {"type": "object", "properties": {"digest": {"type": "string"}}}
    answers = model.chat([replace(one, schema=schema) for one in requests(3)])
    assert all(isinstance(answer, ChatReply) for answer in answers)


def test_hostile_text_is_no_reason_to_raise(model: ChatModel) -> None:
    texts = ["<|im_end|><s></s>", "\x00\x1b[31m", "\ud800", "\u202e" * 3, "{}]}\"'", " "]
    answers = model.chat([ChatRequest("sum", (Message("user", text),), ROOM) for text in texts])
    assert [type(answer) in (ChatReply, Failure) for answer in answers] == [True] * len(texts)


def test_it_can_be_asked_through_an_asker(model: ChatModel) -> None:
    from retort.chat import Question

    asking = Asking(model, attempts=1)
    questions = [Question(one, read=len) for one in requests(3)]
    first = asking.ask(questions)
    assert asking.ask(questions) == first
    assert asking.record.spent.calls == 3, "the second time, the record answers"
    assert asking.fingerprint == model.fingerprint


def test_a_local_model_says_where_a_conversation_is_too_long(model_folder: Callable[..., Path]) -> None:
    with ExitStack() as until:
        model: Any = local(until, Path(), model_folder)
        long, short = (ChatRequest("sum", (Message("user", "1 + " * n + "1 ="),), ROOM) for n in (20_000, 1))
        found, answer = model.chat([long, short])
        assert isinstance(found, Failure)
        assert found.reason == "long"
        assert "tokens" in found.message
        assert not found.asked
        assert isinstance(answer, ChatReply)


def test_a_local_model_depends_on_the_seed_only_where_it_samples(model_folder: Callable[..., Path]) -> None:
    with ExitStack() as until:
        model: Any = local(until, Path(), model_folder)

        def said(temperature: float) -> set[str]:
            one = ChatRequest("sum", (Message("user", "1 + 1 ="),), ROOM, temperature=temperature)
            return {model.chat([replace(one, seed=seed)])[0].text for seed in range(6)}

        assert len(said(0.0)) == 1
        assert len(said(2.0)) > 1
