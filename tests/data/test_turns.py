"""Conversations that are split into one prompt for each turn of the assistant, in the formats of real data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.core.rollouts import Prompt
from retort.data import each_turn, prompts_from_rows
from retort.errors import UserError
from retort.train.setup.prompts import read_prompts

WEATHER = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
#: OpenAI's messages: a call, its result, an answer, and one more question and answer.
CALLING = {
    "id": "rome",
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "tool", "content": "31 degrees"},
        {"role": "assistant", "content": "Yes, 31 degrees."},
        {"role": "user", "content": "And dry?"},
        {"role": "assistant", "content": "Nobody said."},
    ],
    "answer": "unknown",
    "solution": "The tool did not say.",
    "domain": "weather",
}
#: ToolACE: ShareGPT's turns, `user` and `assistant`, calls as text, a system column of its own.
TOOLACE = {
    "system": "You may call [add(a, b)].",
    "conversations": [
        {"from": "user", "value": "2 and 2?"},
        {"from": "assistant", "value": "[add(a=2, b=2)]"},
        {"from": "tool", "value": "[4]"},
        {"from": "assistant", "value": "4."},
    ],
}


def steps(*rows: dict[str, Any]) -> tuple[list[Prompt], list[str]]:
    notes: list[str] = []
    return each_turn(prompts_from_rows(list(rows)), notes), notes


def roles(prompt: Prompt) -> list[str]:
    return [message.role for message in prompt.messages]


def test_openais_messages_with_a_call_of_a_tool() -> None:
    found, notes = steps(CALLING)
    assert [step.id for step in found] == ["rome:1", "rome:2", "rome:3"]
    assert [roles(step) for step in found] == [
        ["system", "user"],
        ["system", "user", "assistant", "tool"],
        ["system", "user", "assistant", "tool", "assistant", "user"],
    ]
    assert [step.response for step in found] == [None, "Yes, 31 degrees.", "Nobody said."]
    assert found[1].messages[2].extra["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert {step.domain for step in found} == {"weather"}
    assert all(step.tools == found[2].tools for step in found)
    assert [(step.answer, dict(step.privileged)) for step in found[:2]] == [(None, {})] * 2
    assert (found[2].answer, found[2].privileged) == ("unknown", {"solution": "The tool did not say."})
    assert "1 row, 3 steps" in notes[0]
    assert notes[1:] == ["the given turn calls a tool, so there is no response in words: 1 of 3"]


def test_sharegpts_turns_as_toolace_has_them() -> None:
    found, _ = steps(TOOLACE, {"prompt": "3 and 3?", "response": "6"})
    assert [step.id for step in found] == ["0:1", "0:2", "1"]
    assert [roles(step) for step in found] == [["system", "user"], ["system", "user", "assistant", "tool"], ["user"]]
    assert [step.response for step in found] == ["[add(a=2, b=2)]", "4.", "6"]


def test_a_conversation_that_ends_with_a_question_has_a_step_to_come() -> None:
    found, _ = steps({"messages": TOOLACE["conversations"][:3], "id": "open"})
    assert [(step.id, step.response) for step in found] == [("open:1", "[add(a=2, b=2)]"), ("open:2", None)]
    assert roles(found[1]) == ["user", "assistant", "tool"]


def test_a_greeting_is_in_the_history_and_no_step() -> None:
    greeted = [{"from": "gpt", "value": "Hello!"}, *TOOLACE["conversations"]]
    found, notes = steps({"conversations": greeted, "system": "Be kind."})
    assert [roles(step)[:3] for step in found] == [["system", "assistant", "user"]] * 2
    assert any("before anybody asks" in note for note in notes)
    alone, _ = steps({"conversations": greeted[:3], "id": "a"})
    assert [(step.id, step.response) for step in alone] == [("a", "[add(a=2, b=2)]")]


def test_ids_stay_unique() -> None:
    row = {"conversations": TOOLACE["conversations"]}
    found, _ = steps({**row, "id": "a"}, {"prompt": "x", "id": "a:1"}, {"prompt": "y", "id": "step-a:1"})
    assert [step.id for step in found] == ["step-step-a:1", "a:2", "a:1", "step-a:1"]


def test_two_turns_of_the_assistant_in_a_row_are_refused() -> None:
    first, *rest = TOOLACE["conversations"]
    with pytest.raises(
        UserError, match=r"row 'x': two turns .* \(the second is '\[add\(a=2, b=2\)\]'\).*join them"
    ) as own:
        steps({"id": "x", "conversations": [first, {"from": "gpt", "value": "Let me see."}, *rest]})
    assert "\n" not in str(own.value)


def split(data: Path, **settings: Any) -> tuple[list[Prompt], list[Prompt], list[str]]:
    notes: list[str] = []
    train, held_out = read_prompts(configuration.resolve({"data": str(data), **settings}), str(data), notes)
    return train, held_out, notes


def test_rows_are_held_out_whole_and_every_step_is_in_the_template(tmp_path: Path) -> None:
    data = tmp_path / "talks.jsonl"

    def talk(row: int) -> dict[str, Any]:
        names = ("user", "assistant") * 3
        return {"messages": [{"role": name, "content": f"{row} {name} {turn}"} for turn, name in enumerate(names)]}

    data.write_text("".join(json.dumps(talk(row)) + "\n" for row in range(10)))
    settings = {"data_turns": "each", "prompt_template": "<{prompt}>", "eval": {"problems": 2}}
    train, held_out, notes = split(data, **settings)
    assert (len(train), len(held_out)) == (24, 2)
    assert not {step.id.split(":")[0] for step in train} & {prompt.id for prompt in held_out}
    assert [step.id for step in train][:3] == [f"{train[0].id.split(':')[0]}:{turn}" for turn in (1, 2, 3)]
    assert [len(prompt.messages) for prompt in held_out] == [5, 5]
    assert all(prompt.messages[-1].content.startswith("<") for prompt in (*train, *held_out))
    assert not any(message.content.startswith("<") for step in train for message in step.messages[:-1])
    assert any("8 rows, 24 steps" in note for note in notes)
    whole, _, _ = split(data, eval={"problems": 2})
    assert [prompt.id for prompt in whole] == sorted({step.id.split(":")[0] for step in train}, key=int)


def test_a_step_that_is_evaluated_on_is_noted(tmp_path: Path) -> None:
    data, other = tmp_path / "talks.jsonl", tmp_path / "eval.jsonl"
    data.write_text(json.dumps(CALLING) + "\n")
    other.write_text(json.dumps({"messages": CALLING["messages"][:2], "tools": CALLING["tools"], "answer": "1"}) + "\n")
    own = {"eval": {"data": str(other)}}
    assert not [note for note in split(data, **own)[2] if "also in" in note]
    noted = [note for note in split(data, data_turns="each", **own)[2] if "also in" in note]
    assert len(noted) == 1
    assert "'rome:1' first" in noted[0]
