"""Environments with a method `call`: which calls reach it, and what the model reads of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import make_tokenizer

from retort.align.calls import Call
from retort.align.chat import TemplateOptions, render
from retort.align.replies import reply_ids
from retort.align.text import decode
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.behind import BehindExpert
from retort.envs.text import TextEpisodes
from retort.errors import UserError

ROW = Prompt("row 1", (Message("user", "add 3"),))
NUMBER = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}
TOOLS = (
    {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": NUMBER}},
    {"type": "function", "function": {"name": "answer", "description": "Answer.", "parameters": {"type": "object"}}},
)


class Adding:
    """Adds what it is told to; an answer ends the episode."""

    tools = TOOLS

    def __init__(self) -> None:
        self.total = 0
        self.heard: list[Any] = []

    def reset(self, task: str, seed: int) -> str:
        return "0"

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        self.heard.append((name, arguments))
        if name == "answer":
            return "so", 1.0, True, {"success": self.total == 3}
        self.total += arguments["by"]
        return str(self.total), 0.25, False, {}

    def expert(self) -> list[str]:
        return [call("add", by=1), call("add", by=2), call("answer")]


class Talking(Adding):
    def step(self, text: str) -> Any:
        self.heard.append(text)
        return "say more", 0.0, False, {}


def call(name: str, **arguments: Any) -> str:
    import json

    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def begun(make: Callable[[], Any] = Adding, *, tools: bool = True) -> Any:
    return TextEpisodes(make, "mine", tools=tools).begin_group(ROW, [0])[0]


def said(reply: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in reply.messages]


def test_calls_are_played_and_replied_to_as_tools() -> None:
    episode = begun()
    reply = episode.reply(call("add", by=2))
    assert reply.messages == (Message("tool", "2", {"name": "add", "tool_call_id": "call00100"}),)
    assert (reply.reward, reply.over, reply.measures["tool_errors"]) == (0.25, False, 0)
    last = episode.reply(call("add", by=1) + call("answer") + call("add", by=5))
    assert said(last) == [("tool", "3"), ("tool", "so")]
    assert [message.extra["tool_call_id"] for message in last.messages] == ["call00200", "call00201"]
    assert (last.reward, last.over, last.status, last.measures["success"]) == (1.25, True, Status.COMPLETED, 1.0)
    assert episode.game.heard == [("add", {"by": 2}), ("add", {"by": 1}), ("answer", {})]


def test_an_own_id_comes_back() -> None:
    reply = begun().reply('{"name": "add", "arguments": {"by": 1}, "id": "a1B2c3D4e"}')
    assert reply.messages[0].extra["tool_call_id"] == "a1B2c3D4e"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call>add 3</tool_call>", "error: the call is not valid JSON"),
        (call("fly"), "error: there is no such tool; there is: add, answer"),
        (call("add"), "error: the arguments must have by"),
        (call("add", by="1"), "error: by must be of the type integer"),
        ('{"name": "add", "parameters": 5}', "error: the arguments must be a JSON object"),
    ],
)
def test_a_wrong_call_gets_words_back_and_is_counted(text: str, words: str) -> None:
    for tools, role in ((True, "tool"), (False, "user")):
        episode = begun(tools=tools)
        reply = episode.reply(text)
        assert said(reply) == [(role, words)]
        assert (reply.over, reply.reward, reply.measures) == (False, 0.0, {"success": 0.0, "tool_errors": 1.0})
        assert episode.game.heard == []
    tagged = text if text.startswith("<") else f"<tool_call>{text}</tool_call>"
    mixed = begun().reply(call("add", by=1) + tagged)
    assert (len(mixed.messages), mixed.reward, mixed.measures["tool_errors"]) == (2, 0.25, 1.0)


def test_several_replies_are_one_message_where_the_tools_are_not_shown() -> None:
    reply = begun(tools=False).reply(call("add", by=1) + call("fly"))
    assert said(reply) == [("user", "1\nerror: there is no such tool; there is: add, answer")]


def test_a_turn_without_a_call_goes_to_step_where_there_is_one() -> None:
    episode = begun(Talking)
    assert said(episode.reply("so")) == [("user", "say more")]
    assert said(episode.reply(call("add", by=1))) == [("tool", "1")]
    assert episode.game.heard == ["so", ("add", {"by": 1})]
    alone = begun().reply("so")
    assert said(alone) == [("user", "error: this turn has no call; call one of the tools: add, answer")]
    assert (alone.measures["tool_errors"], alone.over) == (1.0, False)


def test_a_call_that_raises_or_returns_something_else_is_told_apart() -> None:
    def breaks(self: Any, name: str, arguments: Any) -> Any:
        raise LookupError("no\nsuch level")

    reply = begun(type("Broken", (Adding,), {"call": breaks})).reply(call("add", by=1))
    assert (reply.status, reply.feedback) == (
        Status.ERROR,
        "mine: turn 1: call raised LookupError: no such level",
    )
    odd = begun(type("Odd", (Adding,), {"call": lambda self, name, arguments: "3"}))
    with pytest.raises(UserError, match=r"row 'row 1', turn 1: call returned '3'; return observation, reward, done"):
        odd.reply(call("add", by=1))
    with pytest.raises(UserError, match="mine: it has a method `call` and no `tools`"):
        begun(type("Bare", (Adding,), {"tools": ()}), tools=False)


def test_an_experts_calls_are_replayed_and_what_follows_is_read_by_the_tokenizer() -> None:
    (episode,) = BehindExpert(TextEpisodes(Adding, "mine", tools=True), 2).begin_group(ROW, [0])
    assert [message.role for message in episode.prompt.messages] == ["user", "assistant", "tool"]
    reply = episode.called("what the tokenizer read", [Call("add", {"by": 2})])  # type: ignore[attr-defined]
    assert said(reply) == [("tool", "3")]


# --- as the template writes it ---

#: A template that takes the reply of a tool only behind a turn that called one, as those of gpt-oss do.
STRICT = (
    "{% set ns = namespace(called=none) %}{% for message in messages %}<|im_start|>"
    "{% if message.role == 'tool' %}{% if ns.called is none %}{{ raise_exception('no tool was called') }}{% endif %}"
    "answer {{ ns.called }} {% elif message.tool_calls is defined %}"
    "{% set ns.called = message.tool_calls[0].function.name %}{{ ns.called }} {% endif %}"
    "{{ message.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def test_the_reply_of_a_tool_follows_a_call_where_the_template_asks_for_one() -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    tokenizer.chat_template = STRICT
    said = begun().reply(call("add", by=2)).messages
    ids = reply_ids(ROW, said, tokenizer.eos_token_id, tokenizer, TemplateOptions())
    assert decode(tokenizer, ids) == "<|im_start|> answer add 2 <|im_end|> <|im_start|> <unk>"
    with pytest.raises(UserError, match="no tool was called"):
        reply_ids(ROW, (*said, Message("user", "so")), tokenizer.eos_token_id, tokenizer, TemplateOptions())


def test_a_template_that_cannot_show_the_tools_is_refused() -> None:
    with pytest.raises(UserError, match="leaves out tools without a word"):
        render(begun().prompt, make_tokenizer(eos="<|im_end|>", chat=True))
