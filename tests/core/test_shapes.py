"""Rows as people have them: each shape is read as what it means, or refused; nothing is dropped silently."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import pytest

from retort.core.rollouts import Message, Prompt
from retort.data import fingerprint, prompts_from_rows
from retort.errors import UserError

ASK, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
HUMAN, GPT = {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "4", "tool_call_id": "c1"}
AS_TEXT = {"function": {"name": "add", "arguments": '{"a": 2, "b": null}'}, "type": "function"}

USER = Message("user", "2 + 2?")
CALLS = Message("assistant", "", {"tool_calls": [CALL]})
TOOLS = Message("tool", "4", {"tool_call_id": "c1"})


def chat(*messages: Message, **more: Any) -> Prompt:
    return Prompt("0", messages, plain=False, **more)


def bare(text: str, **more: Any) -> Prompt:
    return Prompt("0", (Message("user", text),), **more)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


def read(row: dict[str, Any], **columns: str) -> tuple[Prompt, list[str]]:
    notes: list[str] = []
    (prompt,) = prompts_from_rows([row], columns=columns, notes=notes)
    return prompt, notes


SHAPES: dict[str, tuple[dict[str, Any], dict[str, str], Prompt, str]] = {
    # name: row, columns, what is read, what the notes say (empty: nothing)
    "conversation with its answer": (
        {"messages": [ASK, REPLY]},
        {},
        chat(USER, response="4"),
        "is read as the response",
    ),
    "the same answer twice": (
        {"messages": [ASK, REPLY], "response": " 4"},
        {},
        chat(USER, response=" 4"),
        "is read as the response",
    ),
    "only the last turn is the response": (
        {"prompt": [ASK, REPLY, ASK, REPLY]},
        {},
        chat(USER, Message("assistant", "4"), USER, response="4"),
        "is read as the response",
    ),
    "an empty last turn": (
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        {},
        chat(USER),
        "empty and left out",
    ),
    "response as a turn": (
        {"prompt": [ASK], "response": [REPLY]},
        {},
        chat(USER, response="4"),
        "read as the response",
    ),
    "completion as TRL writes it": (
        {"prompt": [ASK], "completion": [REPLY]},
        {"response": "completion"},
        chat(USER, response="4"),
        "read as the response",
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, {}, chat(USER, response="4"), "`conversations` is read as"),
    "ShareGPT, mapped": (
        {"conversations": [{"from": "system", "value": "Add."}, HUMAN]},
        {"messages": "conversations"},
        chat(Message("system", "Add."), USER),
        "",
    ),
    "ShareGPT under a name of ours": ({"messages": [HUMAN, GPT]}, {}, chat(USER, response="4"), "read as the response"),
    "ShareGPT with tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": null}}'},
                {"from": "observation", "value": "4"},
                GPT,
            ],
            "tools": json.dumps([TOOL]),
            "system": "",
        },
        {},
        chat(USER, CALLS, Message("tool", "4"), response="4", tools=(TOOL,)),
        "`conversations` is read as",
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {},
        bare("Add.\n\n2 + 2", response="4"),
        "read as Alpaca",
    ),
    "Alpaca without input": (
        {"instruction": "Go.", "input": "", "output": "4"},
        {},
        bare("Go.", response="4"),
        "Alpaca",
    ),
    "Alpaca with a system text": (
        {"instruction": "Go.", "output": "4", "system": "Add."},
        {},
        chat(Message("system", "Add."), Message("user", "Go."), response="4"),
        "`system` is read as the system's turn",
    ),
    "an instruction alone is mapped by the user": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {"prompt": "instruction", "response": "output"},
        bare("Add.", response="4"),
        "columns not used: input; `input` belongs to an Alpaca row",
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": parts("2 +", "2?")}]},
        {},
        chat(Message("user", "2 +\n2?")),
        "",
    ),
    "tool calls and replies": (
        {"messages": [ASK, CALLED, TOLD], "tools": [TOOL]},
        {},
        chat(USER, CALLS, TOOLS, tools=(TOOL,)),
        "",
    ),
    "arguments as JSON text": (
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [AS_TEXT]}, TOLD]},
        {},
        chat(USER, CALLS, TOOLS),
        "",
    ),
    "a single call, as it was once written": (
        {
            "messages": [
                ASK,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 2, "b": null}'},
                },
                {"role": "function", "name": "add", "content": "4"},
            ]
        },
        {},
        chat(USER, CALLS, Message("tool", "4", {"name": "add"})),
        "turns have a key `name`",
    ),
    "a conversation that ends with a call": (
        {"messages": [ASK, CALLED]},
        {},
        chat(USER),
        "calls a tool and is left out",
    ),
    "tools of a plain prompt": (
        {"prompt": "2 + 2?", "tools": [json.dumps(TOOL)]},
        {},
        chat(USER, tools=(TOOL,)),
        "",
    ),
    "keys that a template may not know": (
        {"messages": [{**ASK, "name": "Ada", "weight": None}, {**REPLY, "reasoning_content": "hm"}]},
        {},
        chat(Message("user", "2 + 2?", {"name": "Ada"}), response="4"),
        "the last turn's `reasoning_content` is not in the response",
    ),
    "messages as JSON text": ({"messages": json.dumps([ASK, REPLY])}, {}, chat(USER, response="4"), "is JSON text"),
    "a prompt that is JSON text of turns": ({"prompt": json.dumps([HUMAN])}, {}, chat(USER), "is JSON text"),
    "a prompt that is other JSON": ({"prompt": '[{"a": 1}]'}, {}, bare('[{"a": 1}]'), ""),
    "a prompt that only begins like JSON": ({"prompt": "[1, 2"}, {}, bare("[1, 2"), ""),
    "a prompt that is an empty list": ({"prompt": "[]"}, {}, bare("[]"), ""),
    "verl": (
        {"prompt": [ASK], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "x"},
        {"answer": "reward_model.ground_truth"},
        chat(USER, answer="4"),
        "columns not used: data_source",
    ),
    "verl, not mapped": (
        {"prompt": [ASK], "reward_model": {"style": "rule", "ground_truth": "4"}},
        {},
        chat(USER),
        "columns not used: reward_model (of style, ground_truth); if `reward_model.ground_truth` is the right answer, "
        "map it: columns.answer=reward_model.ground_truth",
    ),
    "a name that holds a dot": (
        {"a.b": "x", "a": {"b": "y"}},
        {"prompt": "a.b"},
        bare("x"),
        "columns not used: a (of b)",
    ),
    "columns that are not used": ({"prompt": "x", "level": 3, "n": 1}, {}, bare("x"), "columns not used: level, n"),
    "a completion that is not mapped": (
        {"prompt": "x", "completion": "y"},
        {},
        bare("x"),
        "columns not used: completion; if `completion` is the response to learn from, map it: "
        "columns.response=completion",
    ),
    "a turn with its time": (
        {"conversation": [{**ASK, "timestamp": datetime.datetime(2024, 2, 29, 12)}]},
        {},
        chat(Message("user", "2 + 2?", {"timestamp": "2024-02-29T12:00:00"})),
        "turns have a key `timestamp`",
    ),
    "a decimal": ({"prompt": "x", "answer": Decimal("1E+3")}, {}, bare("x", answer="1000"), ""),
    "a date": ({"prompt": "x", "answer": datetime.date(2024, 2, 29)}, {}, bare("x", answer="2024-02-29"), ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    row, columns, expected, said = SHAPES[shape]
    before = json.dumps(row, default=str)
    prompt, notes = read(row, **columns)
    assert prompt == expected
    assert json.dumps(row, default=str) == before  # what the caller holds is not changed
    assert any(said in note for note in notes) if said else notes == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "two answers": ({"messages": [ASK, REPLY], "response": "5"}, {}, ["'response'", "differ", "leave one"]),
    "two Alpaca answers": ({"instruction": "x", "output": "y", "response": "z"}, {}, ["'response'", "differ"]),
    "two turns of the assistant": ({"messages": [ASK, REPLY, REPLY]}, {}, ["assistant's", "join"]),
    "an answer alone": ({"messages": [REPLY]}, {}, ["assistant's", "begin with a user's turn"]),
    "an answer to nobody": ({"messages": [{"role": "system", "content": "x"}, REPLY]}, {}, ["the system's"]),
    "a turn without a role": ({"messages": [{"text": "x"}]}, {}, ["message 0", "no 'role'", "its keys: text"]),
    "a role of nobody's": (
        {"conversations": [{"from": "hunan", "value": "x"}]},
        {},
        ["'hunan'", "did you mean 'human'?"],
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [*parts("x"), {"type": "image_url", "image_url": {}}]}]},
        {},
        ["message 0, part 1", "a part of type 'image_url' holds no image"],
    ),
    "a call of nothing": ({"messages": [ASK, {**REPLY, "tool_calls": [{}]}]}, {}, ["message 1", "tool call"]),
    "calls that are no list": ({"messages": [ASK, {**REPLY, "tool_calls": 3}]}, {}, ["message 1", "tool_calls", "int"]),
    "a ShareGPT call in words": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "add 2 and 2"}]},
        {},
        ["message 1", "not JSON"],
    ),
    "a key that JSON cannot spell": ({"messages": [{**ASK, "when": object()}]}, {}, ["message 0", "'when'", "JSON"]),
    "half a character in a call": (
        {"messages": [ASK, {**CALLED, "name": "\ud83d"}, TOLD]},
        {},
        ["message 1", "half a character"],
    ),
    "tools in words": ({"prompt": "x", "tools": "hammer"}, {}, ["'tools'", "not JSON"]),
    "tools that are no schemas": ({"prompt": "x", "tools": [3]}, {}, ["'tools' holds 3"]),
    "messages in words": ({"messages": "hello"}, {}, ["'messages' is text that is not JSON"]),
    "messages of Python": ({"messages": str([ASK])}, {}, ["Python's notation", "json.dumps"]),
    "a prompt of Python": ({"prompt": str([ASK])}, {}, ["Python's notation", "json.dumps"]),
    "two system texts": (
        {"messages": [{"role": "system", "content": "a"}, ASK], "system": "b"},
        {},
        ["'system'", "differ"],
    ),
    "a response of two turns": ({"prompt": "x", "response": [ASK, REPLY]}, {}, ["'response' holds turns"]),
    "a part that is not there": (
        {"prompt": "x", "reward_model": {"ground_truth": "4"}},
        {"answer": "reward_model.ground_trut"},
        ["not there", "did you mean 'reward_model.ground_truth'?"],
    ),
    "a prompt inside a structure": ({"extra": {"question": "x"}}, {}, ["columns.prompt=extra.question"]),
    "an answer that is true": ({"prompt": "x", "answer": True}, {}, ["'answer' is bool", "yes, true"]),
    "an answer of several": ({"prompt": "x", "answer": ["1", "2"]}, {}, ["'answer' is list", "one of them"]),
    "an answer with parts": (
        {"prompt": "x", "answer": {"value": 1}},
        {},
        ["'answer' is dict", "columns.answer=", "value"],
    ),
    "an answer that is no number": ({"prompt": "x", "answer": float("nan")}, {}, ["'answer' is nan", "null"]),
    "a decimal that is no number": ({"prompt": "x", "answer": Decimal("NaN")}, {}, ["'answer' is NaN", "null"]),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(shape: str) -> None:
    row, columns, expected = REFUSED[shape]
    with pytest.raises(UserError) as caught:
        prompts_from_rows([row], columns=columns)
    message = str(caught.value)
    assert message.startswith("data, row 0")
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_what_python_cannot_walk_or_write_is_refused_too() -> None:
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    for row, said in (
        ({"messages": deep}, "nested too deeply"),
        ({"prompt": "x", "answer": 10**5000}, "thousands of digits"),
        ({"prompt": json.dumps(deep), "meta": deep}, ""),
    ):
        if said:
            with pytest.raises(UserError, match=f"data, row 0: .*{said}"):
                prompts_from_rows([row])
        else:
            assert prompts_from_rows([row])[0].text == row["prompt"]


def test_ids_meet_no_other_id() -> None:
    def ids(*given: object) -> list[str]:
        rows = [{"prompt": "x"} if name is None else {"prompt": "x", "id": name} for name in given]
        return [prompt.id for prompt in prompts_from_rows(rows)]

    assert ids(None, None, None) == ["0", "1", "2"]
    assert ids("a", None, "b") == ["a", "1", "b"]
    assert ids(1, None, None) == ["1", "row-1", "2"]
    assert ids("1", None, "row-1", 0) == ["1", "row-row-1", "row-1", "0"]
    assert ids(None, 0) == ["row-0", "0"]  # also where the id comes later


def test_notes_count_rows_and_name_each_column_once() -> None:
    notes: list[str] = []
    rows = [{"messages": [ASK, REPLY], "source": "a"}, {"messages": [ASK], "source": "b"}] * 3
    prompts_from_rows(rows, where="mine", notes=notes)
    assert notes == [
        "mine: the last turn, the assistant's, is read as the response: 3 of 6 rows",
        "mine: columns not used: source",
    ]


def test_rows_of_python() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    numpy = pytest.importorskip("numpy")
    pandas = pytest.importorskip("pandas")
    # Arrow gives every structure the keys of all of them: nulls in there say nothing.
    calls = [{"messages": [ASK, CALLED, TOLD], "tools": [TOOL]}, {"messages": [{**ASK, "name": "Ada"}], "tools": None}]
    for rows in (datasets.Dataset.from_list(calls), iter(calls)):
        first, second = prompts_from_rows(rows)
        assert [turn.role for turn in first.messages] == ["user", "assistant", "tool"]
        assert first.messages[0] == USER
        assert second.messages[0].extra == {"name": "Ada"}
        assert (len(first.tools), second.tools) == (1, ())
    with pytest.raises(UserError, match="'answer' is NaTType"):
        prompts_from_rows([{"prompt": "x", "answer": pandas.NaT}])
    frame = pandas.DataFrame({"messages": [numpy.array([ASK], dtype=object)], "answer": numpy.array([4])})
    assert prompts_from_rows(frame.to_dict("records"))[0] == chat(USER, answer="4")
    with pytest.raises(UserError, match="to_dict"):
        prompts_from_rows(frame)
    with pytest.raises(UserError, match="one of its splits"):
        prompts_from_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(calls)}))
    with pytest.raises(UserError, match="data: is a str"):
        prompts_from_rows("rows.jsonl")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data, row 1: is a str"):
        prompts_from_rows([{"prompt": "x"}, "y"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="held out: no rows"):
        prompts_from_rows([], where="held out")
    assert len(prompts_from_rows([{"prompt": "x"}, {}], limit=1)) == 1


def test_the_fingerprint_sees_calls_and_tools_and_is_the_old_one_without_them() -> None:
    row = {"messages": [ASK, CALLED, TOLD], "tools": [TOOL]}
    other = {"type": "function", "function": {"name": "sub", "arguments": {}}}
    changes = [{}, {"tools": None}, {"tools": [other]}, {"messages": [ASK, {**CALLED, "tool_calls": [other]}, TOLD]}]
    assert len({fingerprint(prompts_from_rows([{**row, **change}])) for change in changes}) == len(changes)
    old = "24a1f3c11072a8f85f041223f916b79cc43b52925ee697fc098ff4876c242416"
    assert fingerprint([chat(USER, answer="4", response="4", clean=(USER,)), bare("x")]) == old
