"""Data that is refused or spoken of because reading it as text would lose something that its author meant."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retort.core.rollouts import Prompt
from retort.data import load_prompts, prompts_from_rows
from retort.errors import UserError

TURN = {"role": "user", "content": "What is it?"}


def _read(row: dict[str, Any], **columns: str) -> tuple[Prompt, list[str]]:
    notes: list[str] = []
    (prompt,) = prompts_from_rows([row], columns=columns, notes=notes)
    return prompt, notes


class _Picture:
    """What `datasets` makes of a cell of its feature Image, told by the library that it is of."""


_Picture.__module__ = "PIL.PngImagePlugin"


@pytest.mark.parametrize(
    ("row", "columns", "place"),
    [
        ({"prompt": "What is it?", "Images": [None, {"url": "x"}]}, {}, "row 0: 'Images'"),
        ({"prompt": "What is it?", "audio": b"RIFF"}, {}, "row 0: 'audio'"),
        ({"prompt": "What is it?", "video": {"path": "a.mp4"}}, {}, "row 0: 'video'"),
        ({"prompt": "What is it?", "shown": {"bytes": b"x", "path": None}}, {}, "row 0: 'shown'"),
        ({"prompt": "What is it?", "shown": _Picture()}, {}, "row 0: 'shown'"),
        ({"prompt": "What is it?", "shown": [_Picture()]}, {}, "row 0: 'shown'"),
        ({"messages": [{**TURN, "images": ["1.jpg"]}]}, {}, "row 0, message 0: 'images'"),
        ({"asked": {"text": "What is it?", "image": "1.jpg"}}, {"prompt": "asked.text"}, "row 0, 'asked': 'image'"),
        ({"prompt": "What is it?", "image": "1.jpg"}, {"images": "shown"}, "row 0: 'image'"),
    ],
)
def test_what_is_not_read_is_not_left_out_in_silence(row: dict[str, Any], columns: dict[str, str], place: str) -> None:
    row = row | {column: None for column in columns.values() if "." not in column}
    with pytest.raises(
        UserError,
        match=r"map the column of images \(columns.images=...\).*; leave other such rows out, or drop the column",
    ) as refused:
        _read(row, **columns)
    assert place in str(refused.value)


@pytest.mark.parametrize(
    "empty", [None, "", " ", [], [None], {}, {"bytes": None, "path": None}, float("nan"), 0, False]
)
def test_a_column_of_images_without_one_is_only_not_used(empty: Any) -> None:
    assert _read({"prompt": "What is it?", "image": empty})[0].text == "What is it?"


def test_a_column_that_is_read_as_text_may_have_any_name() -> None:
    assert _read({"video": "A film begins."}, prompt="video")[0].text == "A film begins."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 5}, "'prompt' is an int; expected text or a list of {role, content}"),
        ({"prompt": b"x"}, "'prompt' is bytes; expected text or a list of {role, content}: make text of it with"),
        ({"messages": b"x"}, "'messages' is bytes; expected a list of {role, content}: make text of it with .decode()"),
        ({"conversations": 5}, "'conversations' is an int; expected a list"),
        ({"prompt": "x", "answer": b"4"}, "'answer' is bytes; expected text or a number: make text of it with"),
        ({"prompt": "x", "clean": b"4"}, "'clean' is bytes"),
        (
            {"messages": [{"role": "user", "content": b"x"}]},
            "content is bytes; expected text, or a list of parts: make text",
        ),
        ({"messages": [5]}, "message 0: is an int"),
        ({"chosen": [TURN], "rejected": [TURN]}, "columns.messages=chosen"),
        ({"version": 1, "data": [{"prompt": "x"}]}, "if its rows are the list in 'data', give that list alone"),
    ],
)
def test_the_message_names_the_column_and_the_remedy(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        _read(row)
    assert said in str(refused.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_the_rows_is_named(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": 1, "data": [{"prompt": "x"}]}, indent=indent))
    with pytest.raises(UserError, match=r"if its rows are (in|the list in) 'data', (write|give) that list alone"):
        load_prompts(str(file))


TWICE = '{"role": "user", "content": "a", "content": "b"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"prompt": "a", "prompt": "b"}\n'),
        ("rows.jsonl", f'{{"messages": [{TWICE}]}}\n'),
        ("rows.json", '[{"prompt": "a", "prompt": "b"}]'),
        ("rows.jsonl", json.dumps({"messages": f"[{TWICE}]"})),
        ("rows.jsonl", json.dumps({"prompt": f"[{TWICE}]"})),
        ("rows.jsonl", json.dumps({"prompt": "x", "tools": '[{"name": "f", "name": "g"}]'})),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="stands twice in one object"):
        load_prompts(str(tmp_path / name))


def test_words_beside_a_last_call_are_spoken_of() -> None:
    call = {
        "role": "assistant",
        "content": "I look it up.",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    prompt, (note,) = _read({"messages": [TURN, call]})
    assert prompt.response is None
    assert "left out with the words beside the call" in note
    _, (silent,) = _read({"messages": [TURN, {**call, "content": ""}]})
    assert "words beside" not in silent


def test_numbers_of_numpy_are_written_as_it_writes_them() -> None:
    numpy = pytest.importorskip("numpy")
    for kind in (numpy.float16, numpy.float32, numpy.float64):
        assert _read({"prompt": "x", "answer": kind(0.1)})[0].answer == "0.1"
    assert _read({"prompt": "x", "answer": numpy.array(0.1, dtype="float32")})[0].answer == "0.1"
    odd = SimpleNamespace(tolist=lambda: 4)  # whatever else knows `tolist` is what it says
    assert _read({"prompt": "x", "answer": odd})[0].answer == "4"


def test_a_nul_in_a_prompt_is_spoken_of() -> None:
    prompt, (note,) = _read({"prompt": "a\0b"})
    assert prompt.text == "a\0b" and "NUL" in note
