from __future__ import annotations

import json
from pathlib import Path

import pytest

from retort.core.rollouts import Message
from retort.data import fingerprint, load_prompts
from retort.errors import UserError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def failure(source: str, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source, **settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_reads_every_column(file: Path) -> None:
    source = write(
        file,
        {"prompt": "What is 1 + 1?", "answer": 2, "solution": "count", "response": "two", "domain": "sums", "x": [1]},
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}], "id": "chat"},
        {"prompt": [{"role": "user", "content": "listed"}], "answer": 0.5},
    )
    first, second, third = load_prompts(source)
    assert (first.id, first.plain, first.answer, first.response, first.domain) == ("0", True, "2", "two", "sums")
    assert first.messages == (Message("user", "What is 1 + 1?"),)
    assert first.privileged == {"solution": "count"}
    assert (second.id, second.plain, second.answer, second.privileged) == ("chat", False, None, {})
    assert [message.role for message in second.messages] == ["system", "user"]
    assert (third.id, third.plain, third.answer) == ("2", False, "0.5")


def test_prompt_goes_before_messages_unless_messages_is_mapped(file: Path) -> None:
    chat = [{"role": "user", "content": "from the chat"}]
    source = write(file, {"prompt": "plain", "messages": chat, "talk": chat})
    assert load_prompts(source)[0].text == "plain"
    assert load_prompts(source, columns={"messages": "talk"})[0].text == "from the chat"


def test_limit_and_blank_lines_and_byte_order_mark(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}\n{"prompt": ')
    assert [prompt.text for prompt in load_prompts(str(file), limit=2)] == ["a", "b"]
    assert [prompt.id for prompt in load_prompts(str(file), limit=2)] == ["0", "1"]
    assert "at least 1" in failure(str(file), limit=0)


def test_columns_are_mapped(file: Path) -> None:
    source = write(file, {"problem": "p", "prompt": "not this", "answer": "4"})
    assert load_prompts(source, columns={"prompt": "problem"})[0].text == "p"
    assert "did you mean 'problem'?" in failure(source, columns={"prompt": "problm"})
    assert "did you mean 'prompt'?" in failure(source, columns={"promt": "problem"})


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no rows"]),
        (b"\n\n", ["no rows"]),
        (b'{"prompt": "a"}\n{"prompt": "b', ["line 2", "cut off"]),
        (b'{"prompt": "a"}\n{"prompt": b}\n{"prompt": "c"}\n', ["line 2", "not valid JSON", "column 12"]),
        (b'{"prompt": "a"}\n"text"\n', ["line 2", "holds a str"]),
        (b"[\n {}\n]", ["line 1", "one object per line"]),
        (b'[{"prompt": "a"}]\n', ["line 1", "holds a list"]),
        (b'{"prompt": "\xff"}\n', ["line 1", "UTF-8"]),
        (b'{"prompt": "a"}\n{"prompt": "  "}\n', ["line 2", "empty"]),
        (b'{"prompt": null}\n', ["line 1", "'prompt' is null"]),
        (b'{"promt": "a", "y": 1}\n', ["line 1", "found: promt, y", "did you mean 'promt'?"]),
        (b'{"problem": "a"}\n', ["line 1", 'columns = {prompt = "problem"}']),
        (b'{"a": 1}\n', ["no column 'prompt' or 'messages' (found: a)"]),
        (b"{}\n", ["found: nothing"]),
        (b'{"prompt": 3}\n', ["'prompt' is an int; expected text or a list"]),
        (b'{"prompt": "\\ud83d"}\n', ["line 1", "half a character"]),
        (b'{"prompt": "a", "answer": ["b"]}\n', ["line 1", "'answer' is list"]),
        (b'{"prompt": "a", "answer": true}\n', ["'answer' is bool"]),
        (b'{"prompt": "a", "answer": NaN}\n', ["'answer' is nan"]),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", ["line 1", "not valid JSON"]),
        (b'{"prompt": ' + b"[" * 200_000 + b"\n", ["line 1"]),
        (b'{"prompt": "a", "id": "x"}\n{"prompt": "a"}\n{"prompt": "b", "id": "x"}\n', ["line 3", "line 1", "'x'"]),
        (b'{"messages": []}\n', ["line 1", "at least one"]),
        (b'{"messages": ["hi"]}\n', ["line 1, message 0", "is a str"]),
        (b'{"messages": [{"role": "usr", "content": "a"}]}\n', ["message 0", "'usr'", "did you mean 'user'?"]),
        (b'{"messages": [{"role": "user", "content": [1]}]}\n', ["message 0, part 0", "of text and of images"]),
        (b'{"messages": [{"role": "user", "content": " "}]}\n', ["message 0", "empty"]),
        (b'{"messages": [{"role": "user"}]}\n', ["message 0", "NoneType"]),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}',
            ["line 1", "'response'", "differ"],
        ),
    ],
)
def test_each_mistake_names_file_and_line(file: Path, content: bytes, parts: list[str]) -> None:
    file.write_bytes(content)
    message = failure(str(file))
    assert str(file) in message
    for part in parts:
        assert part in message


def test_files_that_are_not_there(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, {"prompt": "a"})
    assert "no such file" in failure("nothing")
    assert failure(str(tmp_path / "row.jsonl")).endswith(f"did you mean '{file}'?")
    assert "no folder" in failure(str(tmp_path / "a" / "b.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "is a folder" in failure(str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert "no such file" in failure("folder/rows.jsonl")  # looks like owner/name, but its ending says file
    (tmp_path / "rows.xlsx").write_text("prompt\n")
    assert "unknown kind of file '.xlsx'" in failure("rows.xlsx")


def test_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    rows = [
        {"problem": "a", "messages": None, "answer": 1, "id": 7},
        {"problem": None, "messages": [{"role": "user", "content": "b"}], "answer": None, "id": 8},
    ]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    first, second = load_prompts(str(path), columns={"prompt": "problem"})
    assert (first.id, first.text, first.answer, first.plain) == ("7", "a", "1", True)
    assert (second.id, second.text, second.answer, second.plain) == ("8", "b", None, False)
    assert "row 0: 'messages' is null" in failure(str(path))

    path.write_bytes(b"PAR1 no more than that")
    message = failure(str(path))
    assert str(path) in message
    assert "not a readable Parquet file" in message


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    asked: list[object] = []

    def load(*names: object, **settings: object) -> list[dict[str, str]]:
        asked.append((names, settings))
        return [{"prompt": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_prompts("owner/name:main", split="test")[0].text == "from the hub"
    assert asked == [(("owner/name", "main"), {"split": "test"})]

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = failure("owner/name")
    assert "no such file" in message
    assert "Couldn't reach the Hub" in message


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").touch()
    assert "pip install 'retort-distill[data]'" in failure(str(tmp_path / "rows.parquet"))
    assert "pip install 'retort-distill[data]'" in failure("owner/name")


def test_fingerprint_sees_every_change(file: Path) -> None:
    row = {"prompt": "a", "answer": "1", "solution": "s", "response": "r", "domain": "d", "id": "i"}
    seen = {fingerprint(load_prompts(write(file, row)))}
    assert fingerprint(load_prompts(str(file))) in seen
    for name in row:
        seen.add(fingerprint(load_prompts(write(file, {**row, name: "other"}))))
    one, two = {"prompt": "x", "id": "1"}, {"prompt": "y", "id": "2"}
    seen.add(fingerprint(load_prompts(write(file, one, two))))
    seen.add(fingerprint(load_prompts(write(file, two, one))))
    assert len(seen) == len(row) + 3
