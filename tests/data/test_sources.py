"""Where rows come from: kinds of files, compressed or not, globs, folders, and data sets that were saved."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort.data import load_prompts
from retort.errors import UserError

ROWS = [{"prompt": "one", "answer": "007"}, {"prompt": "two\nlines, \u2028 and \u00e9", "answer": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=1)
TABLE = 'prompt,answer\none,007\n"two\nlines, \u2028 and \u00e9",\n'
TABS = 'prompt\tanswer\none\t007\n"two\nlines, \u2028 and \u00e9"\t\n'
MARK = "\ufeff"


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


Put = Callable[[str, str | bytes], str]


def said(source: str, **settings: Any) -> list[tuple[str, str | None]]:
    return [(prompt.text, prompt.answer) for prompt in load_prompts(source, **settings)]


def failure(source: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        said(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SAID = [("one", "007"), ("two\nlines, \u2028 and \u00e9", None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.ndjson", MARK + LINES),
        ("ROWS.JSONL", LINES.replace("\n", "\r\n")),
        ("rows.v2.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())),
        ("rows.jsonl.XZ", lzma.compress(LINES.encode())),
        ("rows.json", LINES),
        ("rows.json", MARK + LIST),
        ("rows.json", "\n \n" + json.dumps(ROWS)),
        ("rows.json.gz", gzip.compress(LIST.encode(), mtime=0)),
        ("rows.csv", TABLE),
        ("rows.Csv", MARK + TABLE + "\n\n"),
        ("rows.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("rows.tsv", TABS),
    ],
)
def test_kinds_of_files(put: Put, name: str, content: str | bytes) -> None:
    assert said(put(name, content)) == SAID


def test_a_table_with_bare_carriage_returns_and_one_with_long_cells(put: Put) -> None:
    assert said(put("mac.csv", "prompt,answer\rone,1\rtwo,2\r")) == [("one", "1"), ("two", "2")]
    assert said(put("long.csv", f"prompt\n{'x' * 200_000}\n"))[0][0] == "x" * 200_000
    turns = json.dumps([{"role": "user", "content": 'say "hi"'}]).replace('"', '""')
    assert said(put("chat.csv", f'messages\n"{turns}"\n'))[0][0] == 'say "hi"'


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), ["line 1", "compressed", ".gz"]),
        ("a.jsonl", LINES.encode("utf-16"), ["line 1", "UTF-16", "UTF-8"]),
        ("a.csv", TABLE.encode("utf-16"), ["line 1", "UTF-16", "UTF-8"]),
        ("a.json", LIST.encode("utf-16"), ["line 1", "UTF-16"]),
        ("a.csv", "prompt\n\u00e9\n".encode("latin-1"), ["line 2", "not UTF-8"]),
        ("a.json", '["\u00e9"]'.encode("latin-1"), ["not UTF-8"]),
        ("a.csv", b"PK\x03\x04", ["spreadsheet"]),
        ("a.jsonl", b"PAR1", ["Parquet"]),
        ("a.jsonl", '{"prompt": "a"}\r{"prompt": "b"}\r', ["line 1", "carriage return", "LF"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], ["unpacked", "written to its end?"]),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-9], ["unpacked", "written to its end?"]),
        ("a.csv.xz", lzma.compress(TABLE.encode())[:-9], ["unpacked", "written to its end?"]),
        ("a.jsonl.gz", b"plain", ["unpacked"]),
        ("a.jsonl.bz2", b"plain", ["cannot read"]),
        ("a.jsonl.xz", b"plain", ["unpacked"]),
        ("a.json", '[{"prompt": "a"}, 3]', ["row 1", "holds a int", "each item"]),
        ("a.json", '[{"prompt": "a"},\n', ["not valid JSON", "one list"]),
        ("a.json", "[]", ["no rows"]),
        ("a.csv", "prompt,answer\nx\n", ["line 2", "1 cells", "header 2"]),
        ("a.csv", "prompt,answer\nx,y,z\n", ["line 2", "3 cells", "quotes"]),
        ("a.csv", 'prompt\nx\n"y\n', ["line 3", "quotes closed?"]),
        ("a.csv", "prompt;answer\nx;y\n", ["line 1", "';'", "commas"]),
        ("a.tsv", "prompt,answer\nx,y\n", ["line 1", "','", "tabs"]),
        ("a.csv", "prompt,prompt\nx,y\n", ["line 1", "two columns", "'prompt'"]),
        ("a.csv", "prompt,answer\n", ["no rows"]),
        ("a.parquet.gz", b"", ["unknown kind of file '.parquet.gz'"]),
        ("a.gz", b"", ["unknown kind of file", ".jsonl"]),
        ("a", b"", ["unknown kind of file", ".jsonl"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said(put: Put, name: str, content: str | bytes, parts: list[str]) -> None:
    source = put(name, content)
    message = failure(source)
    assert source in message
    for part in parts:
        assert part in message


def test_a_list_is_pointed_out_in_json_lines(put: Put) -> None:
    assert "end the file's name in .json" in failure(put("a.jsonl", LIST))


def test_zst_needs_its_library_and_names_it(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put("rows.jsonl.zst", LINES)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in failure(source)


def test_zst(put: Put) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the library for .zst files")
    packed = zstandard.ZstdCompressor().compress(LINES.encode())
    assert said(put("rows.jsonl.zst", packed)) == SAID
    halves = [zstandard.ZstdCompressor().compress(part.encode()) for part in (TABLE[:20], TABLE[20:])]
    assert said(put("rows.csv.zst", b"".join(halves))) == SAID
    assert "unpacked" in failure(put("rows.jsonl.zst", packed[:-20]))
    assert "cannot read" in failure(put("rows.jsonl.zst", b"plain"))


def test_globs_and_folders_are_read_in_the_order_of_their_names(put: Put, tmp_path: Path) -> None:
    for place in (2, 0, 1):
        put(f"parts/part-{place}.jsonl", json.dumps({"prompt": str(place)}) + "\n")
    put("parts/.hidden.jsonl", "broken")
    put("parts/_SUCCESS", "")
    put("parts/README.md", "# parts")
    put("parts/more/notes.bak", "not read")
    folder, texts = str(tmp_path / "parts"), ["0", "1", "2"]
    for source in (folder, f"{folder}/", f"{folder}/*.jsonl", f"{folder}/part-[0-9].*", f"{tmp_path}/**/part-*"):
        found = load_prompts(source)
        assert [prompt.text for prompt in found] == texts, source
        assert [prompt.id for prompt in found] == texts  # counted through all files
    notes: list[str] = []
    load_prompts(folder, notes=notes, limit=2)
    assert notes == ["parts: not read in this folder: README.md, more/"]
    put("parts/part-1.jsonl", '{"prompt": "x", "id": "0"}\n{"prompt": "y", "id": "0"}\n')
    message = failure(folder)
    assert f"{folder}/part-1.jsonl, line 2" in message
    assert f"{folder}/part-1.jsonl, line 1" in message
    # A file of that very name is no glob.
    assert said(put("odd[1].jsonl", '{"prompt": "x"}\n')) == [("x", None)]


@pytest.mark.parametrize(
    ("names", "source", "parts"),
    [
        (["a/notes.txt"], "a", ["without data files", "known: .jsonl"]),
        (["a/b/rows.csv"], "a", ["without data files", "did you mean '{0}/a/b'?"]),
        (["a/x.jsonl", "a/y.csv"], "a/", ["several kinds (.csv, .jsonl)", "'{0}/a/*.csv'"]),
        (["a/train-0.csv", "a/train-1.csv", "a/test.csv"], "a", ["several splits (test, train)", "'{0}/a/*train*'"]),
        (["a/my_val.csv", "a/my_dev.csv"], "a", ["several splits (dev, val)", "'{0}/a/*dev*'"]),
        (["a/x.csv", "a/b/y.csv"], "a/*", ["also matches the folder {0}/a/b", "**"]),
        (["a/x.csv", "a/x.txt"], "a/*", ["x.txt", "unknown kind of file '.txt'"]),
        (["a/x.csv"], "a/*.jsonl", ["no file matches"]),
        (["a/x.csv.gz"], "a/x.csv.xz", ["no such file", "did you mean '{0}/a/x.csv.gz'?"]),
    ],
)
def test_folders_and_globs_that_are_unclear(
    put: Put, tmp_path: Path, names: list[str], source: str, parts: list[str]
) -> None:
    for name in names:
        put(name, "prompt\nx\n")
    message = failure(f"{tmp_path}/{source}")
    for part in parts:
        assert part.format(tmp_path) in message


def test_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    one = datasets.Dataset.from_list([{"prompt": "one", "meta": {"answer": "1"}}])
    other = datasets.Dataset.from_list([{"prompt": "two", "meta": {"answer": "2"}}])
    whole, dealt = tmp_path / "whole", tmp_path / "dealt"
    one.save_to_disk(whole)
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(dealt)
    columns = {"answer": "meta.answer"}
    assert said(str(whole), split="anything", columns=columns) == [("one", "1")]
    assert said(str(dealt), columns=columns) == [("one", "1")]
    assert said(str(dealt), split="test", columns=columns) == [("two", "2")]
    assert "no split 'dev'; it has train, test" in failure(str(dealt), split="dev")
    assert f"{dealt} (train), row 0" in failure(str(dealt), columns={"prompt": "meta"})
    shards = tmp_path / "shards"
    for place, part in enumerate((one, other)):
        part.to_parquet(shards / f"{place}.parquet")
    assert said(str(shards), columns=columns) == [("one", "1"), ("two", "2")]
    (whole / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert "not a readable saved data set" in failure(str(whole))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'retort-distill[data]'" in failure(str(dealt))
