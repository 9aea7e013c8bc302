"""Bad input of every kind through the command's entry function: one line, exit code 2, nothing begun, nothing hung."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from retort import registry
from retort.cli import main
from retort.config import Config

DIGITS = "9" * 5001
#: Refused for every number, whatever its field's bounds are.
NO_NUMBER = {
    "nan": "nan",
    "text": "fast",
    "list": "[1]",
    "table": "{a=1}",
    "digits": DIGITS,
    "minus_huge": f"-{10**40}",
}
#: Refused for whatever is neither text nor a table.
SEED_TOO = {"huge": str(10**40)}


def _fields(section: type[BaseModel] = Config, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{before}{name}.")
        elif name not in ("method", "own_method"):
            yield f"{before}{name}", field.annotation


def _wrong(annotation: Any) -> dict[str, str]:
    """Words that no value of an annotation can be."""
    kinds = {annotation, *typing.get_args(annotation)}
    if kinds & {int, float}:
        return NO_NUMBER
    if bool in kinds:
        return {"text": "perhaps", "number": "3", "list": "[true]"}
    if typing.get_origin(annotation) in (list, dict) or any(typing.get_origin(k) in (list, dict) for k in kinds):
        return {"number": "3", "text": "words"}
    if any(typing.get_origin(kind) is typing.Literal for kind in kinds):
        return {"text": "nonsense", "number": "3", "list": "[1]"}
    return {"number": "3", "list": "[1]", "table": "{a=1}"}


def _settings() -> Iterator[Any]:
    for key, annotation in _fields():
        for kind, text in _wrong(annotation).items():
            yield pytest.param(key, text, id=f"{key}-{kind}")


BOUNDS = [
    *("learning_rate=inf", "learning_rate=1e300", "learning_rate=0", "learning_rate=-1", "beta1=1", "grad_clip=0"),
    *("epochs=100000000", "updates=0", "batch_tokens=0", "final=1.5", "weight_decay=inf", "grad_clip=1e-320"),
]
NUMBERS = [
    *(f"optimizer.{word}" for word in BOUNDS),
    *("eval.temperature=1e-300", "eval.temperature=1e300", "eval.temperature=0", "eval.threshold=nan"),
    *("eval.samples=1000000000000", "eval.samples=0", "eval.problems=-1", f"eval.problems={10**12}", "eval.top_p=1.1"),
    *("lora.rank=1000000000000", "lora.alpha=inf", "lora.alpha=1e-320", f"threads={10**40}", "threads=0", "steps=0"),
    *(f"seed={10**40}", f"seed=0x{'f' * 5001}", f"rollout.max_new_tokens={10**12}", "rollout.prompts=0", "limit=0"),
]


def _methods() -> Iterator[Any]:
    for name in registry.names():
        for key, default in registry.defaults(name).items():
            if isinstance(default, int | float) and not isinstance(default, bool):
                yield pytest.param(name, f"method.{key}=fast", id=f"{name}-{key}-text")
                yield pytest.param(name, f"method.{key}=nan", id=f"{name}-{key}-nan")
                yield pytest.param(name, f"method.{key}={10**40}", id=f"{name}-{key}-huge")
        yield pytest.param(name, "method.nonsense=1", id=f"{name}-unknown")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command in an empty folder; returns what it said, after the checks that hold for all bad input."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*words: str, names: str = "", code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        found = main(list(words))
        error = capsys.readouterr().err
        assert (found, error.count("\n")) == (code, 1), error
        assert error.startswith("retort: ")
        assert names in error, error
        assert error.rstrip("\n").isprintable(), error
        assert len(error) < 2500
        assert sorted(tmp_path.rglob("*")) == before, "a refused command wrote something"
        return error

    return run


@pytest.mark.parametrize(("key", "text"), list(_settings()))
def test_settings_of_the_wrong_type(refused: Callable[..., str], key: str, text: str) -> None:
    refused("train", "--out", "run", f"{key}={text}", names=key.split(".")[-1])


@pytest.mark.parametrize("word", NUMBERS, ids=lambda word: word[:40])
def test_numbers_out_of_range(refused: Callable[..., str], word: str) -> None:
    refused("train", "--out", "run", word, names=word.partition("=")[0])


@pytest.mark.parametrize(("name", "word"), list(_methods()))
def test_settings_of_methods(refused: Callable[..., str], name: str, word: str) -> None:
    refused("train", "--out", "run", "--method", name, word, names=word.partition("=")[0].removeprefix("method."))


WORDS: dict[str, tuple[str, ...]] = {
    "method_number": ("train", "method=3"),
    "method_zero": ("train", "method=0"),
    "method_list": ("train", "method=[]"),
    "method_false": ("train", "method=false"),
    "method_name_list": ("train", "method.name=[1]"),
    "method_cold": ("train", "--method", "opd", "method.temperature=1e-320"),
    "method_nan": ("train", "--method", "opd", "method.temperature=nan"),
    "threshold_nan": ("train", "method.entropy_threshold=nan"),
    "seed_digits": ("train", "--seed", DIGITS),
    "steps_text": ("train", "--steps", "many"),
    "no_key": ("train", "=3"),
    "no_value": ("train", "steps"),
    "dots": ("train", ".=3"),
    "deep": ("train", ".".join("a" * 5000) + "=1"),
    "brackets": ("train", "steps=" + "[" * 5000),
    "newline": ("train", "ste\nps=1"),
    "escape": ("train", "\x1b[31mred=1"),
    "bidi": ("train", "\u202eabc=1"),
    "markup": ("train", "[red]=1"),
    "section_twice": ("train", "rollout=3", "rollout.prompts=3"),
    "option": ("train", "--learning-rate", "3"),
    "long_option": ("train", "--" + "x" * 5000),
    "command": ("trian",),
    "nothing": (),
    "toml_missing": ("train", "nowhere.toml"),
    "toml_nul": ("train", "a\0.toml"),
    "toml_long": ("train", "x" * 300 + ".toml"),
    "out_nul": ("train", "--out", "a\0b"),
    "out_long": ("train", "--out", "x" * 300),
    "out_deep": ("train", "--out", "x/" * 3000),
    "out_byte": ("train", "--out", "run\udcff"),
    "out_empty": ("train", "--out", ""),
    "data_nul": ("train", "--data", "a\0b"),
    "data_long": ("train", "--data", "x" * 300 + ".jsonl"),
    "data_user": ("train", "--data", "~nosuchuser/x.jsonl", "--student", "countdown:student", "teacher=x"),
    "student_nul": ("train", "--student", "a\0b"),
    "student_empty": ("train", "--student", ""),
    "resume_nul": ("train", "--resume", "a\0b"),
    "resume_byte": ("train", "--resume", "a\udcff"),
    "resume_nowhere": ("train", "--resume", "nowhere"),
    "resume_settings": ("train", "--resume", "nowhere", "seed=3"),
    "report_nothing": ("report",),
    "report_nowhere": ("report", "nowhere"),
    "report_nul": ("report", "a\0b"),
    "report_long": ("report", "x" * 300),
    "report_empty": ("report", ""),
    "trust_nowhere": ("trust", "nowhere"),
    "trust_nul": ("trust", "a\0b"),
    "trust_zero": ("trust", "nowhere", "--problems", "0"),
    "trust_text": ("trust", "nowhere", "--places", "few"),
    "eval_nothing": ("eval",),
    "eval_setting": ("eval", "x", "optimizer.learning_rate=1"),
    "eval_samples": ("eval", "x", "samples=1000000000000"),
    "eval_cold": ("eval", "x", "temperature=1e-300"),
    "eval_threshold": ("eval", "x", "threshold=nan"),
    "eval_none": ("eval", "x", "problems=0"),
    "eval_nowhere": ("eval", "./nowhere"),
    "cite_nothing": ("cite",),
    "cite_typo": ("cite", "eodp"),
    "cite_escape": ("cite", "\x1b]0;title\x07"),
    "methods_option": ("methods", "--jsn"),
    "doctor_setting": ("doctor", "stepz=3"),
    "doctor_number": ("doctor", "threads=1000000"),
}


@pytest.mark.parametrize("words", list(WORDS.values()), ids=list(WORDS))
def test_words(refused: Callable[..., str], words: tuple[str, ...]) -> None:
    refused(*words)


DATA: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "binary.jsonl": bytes(range(256)),
    "latin1.jsonl": '{"prompt": "é"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "1"}\n'.encode("utf-16"),
    "cut.jsonl": b'{"prompt": "1"}\n{"prompt": "2',
    "list.jsonl": b'[{"prompt": "1"}]\n',
    "text.jsonl": b'"prompt"\n',
    "deep.jsonl": b'{"prompt": ' + b"[" * 100_000 + b"\n",
    "surrogate.jsonl": b'{"prompt": "\\ud83d"}\n',
    "digits.jsonl": b'{"prompt": "1", "answer": ' + DIGITS.encode() + b"}\n",
    "nan.jsonl": b'{"prompt": "1", "answer": NaN}\n',
    "column.jsonl": b'{"promt": "1"}\n',
    "escape.jsonl": b'{"\\u001b[31m": "1", "\\u202e": 2, "\\n": 3}\n',
    "null.jsonl": b'{"prompt": null}\n',
    "number.jsonl": b'{"prompt": 3}\n',
    "role.jsonl": b'{"messages": [{"role": "\\u001b[2J", "content": "1"}]}\n',
    "last.jsonl": b'{"messages": [{"role": "assistant", "content": "1"}]}\n',
    "twice.jsonl": b'{"id": "\\u001b[2J\\n[red]", "prompt": "1"}\n' * 2,
    "empty.parquet": b"",
    "broken.parquet": b"PAR1" + b"\0" * 64 + b"PAR1",
    "kind.xlsx": b"prompt\n1\n",
    "ragged.csv": b"\x1b[31m,prompt\n1\n",
    "twice.csv": b"prompt,\x1b[2J,\x1b[2J\n1,2,3\n",
    "quote.tsv": b'prompt\n"1\n',
    "plain.jsonl.gz": b'{"prompt": "1"}\n',
    "cut.json": b'[{"prompt": "1"},',
    "part.jsonl": b'{"messages": [{"role": "user", "content": [{"type": "\\u001b[2J\\n"}]}]}\n',
    "tools.jsonl": b'{"prompt": "1", "tools": "\\u001b[2J\\n"}\n',
    "call.jsonl": b'{"messages": [{"role": "assistant", "tool_calls": ["\\u001b[2J"]}]}\n',
    "python.jsonl": b"{\"prompt\": \"[{'role': 'user', 'content': '1'}]\"}\n",
    "nested.jsonl": b'{"messages": ' + b"[" * 600 + b"]" * 600 + b"}\n",
}


@pytest.mark.parametrize("name", list(DATA))
def test_data_files(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(DATA[name])
    refused("train", "--out", "run", "--student", "s", "--teacher", "t", "--data", str(path), names=name)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".toml"])
def test_what_is_no_file(refused: Callable[..., str], tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"odd{suffix}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    words = [str(path)] if suffix == ".toml" else ["--data", str(path), "--student", "s", "--teacher", "t"]
    refused("train", "--out", "run", *words, names=path.name)


TOML: dict[str, bytes] = {
    "broken": b"steps =",
    "binary": bytes(range(256)),
    "digits": b"seed = " + DIGITS.encode(),
    "hex": b"seed = 0x" + b"f" * 5001,
    "deep": b"steps = " + b"[" * 50_000,
    "table": b"steps = {a = 1}",
    "unknown": b'"\\u001b[31m" = 1',
    "method": b"method = 3",
    "nul": b'out = "a\\u0000b"',
    "twice": b"steps = 1\nsteps = 2",
}


@pytest.mark.parametrize("kind", list(TOML))
def test_toml_files(refused: Callable[..., str], tmp_path: Path, kind: str) -> None:
    (tmp_path / "run.toml").write_bytes(TOML[kind])
    refused("train", str(tmp_path / "run.toml"))


CONFIGS: dict[str, str] = {
    "empty": "",
    "list": "[]",
    "text": '"x"',
    "deep": "[" * 100_000,
    "digits": '{"method": {"name": "opd"}, "seed": ' + DIGITS + "}",
    "no_method": "{}",
    "method_text": '{"method": "opd", "rollout": {}}',
    "own_nameless": '{"own_method": true, "method": {}}',
    "unknown": '{"method": {"name": "opd"}, "\\u001b": 1}',
}


@pytest.mark.parametrize("command", [("train", "--resume"), ("trust",)], ids=["resume", "trust"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_settings_of_a_run_that_are_none(
    refused: Callable[..., str], tmp_path: Path, kind: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(CONFIGS[kind])
    refused(*command, str(tmp_path / "old"))


def test_a_model_is_no_run(refused: Callable[..., str], model_folder: Callable[..., Path]) -> None:
    refused("train", "--resume", str(model_folder(seed=1)), names="a model's, not a run's")


@pytest.mark.parametrize(("typo", "meant"), [("countdwon", "countdown"), ("rankng", "ranking"), ("coachd", "coached")])
def test_built_in_data_is_suggested(refused: Callable[..., str], typo: str, meant: str) -> None:
    refused(
        "train", "--out", "run", "--student", "s", "--teacher", "t", "--data", typo, names=f"did you mean '{meant}'"
    )
    refused("eval", "x", "--data", typo, names=f"did you mean '{meant}'")


@pytest.mark.parametrize("inside", [False, True])
def test_out_that_is_a_file(refused: Callable[..., str], tmp_path: Path, inside: bool) -> None:
    (tmp_path / "file").write_text("in the way")
    refused("train", "--out", str(tmp_path / "file" / ("run" if inside else "")), names="--out")


PROCESSES: dict[str, tuple[str, ...]] = {
    name: WORDS[name]
    for name in (
        "method_number",
        "seed_digits",
        "deep",
        "brackets",
        "escape",
        "out_long",
        "out_empty",
        "resume_nowhere",
    )
} | {
    "fifo": ("train", "--data", "pipe.jsonl", "--student", "s", "--teacher", "t"),
    "zero": ("train", "--data", "zero.jsonl", "--student", "s", "--teacher", "t"),
    "samples": ("eval", "x", "samples=1000000000000"),
    "rank": ("train", "lora.rank=1000000000000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stdin", ["closed", "empty"])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_in_a_process_of_its_own(tmp_path: Path, name: str, stdin: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    words = [sys.executable, "-m", "retort", *PROCESSES[name]]
    closed = ["sh", "-c", 'exec "$@" <&-', "sh"] if stdin == "closed" else []
    root = str(Path(__file__).parents[2])
    made = subprocess.run(
        [*closed, *words],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert made.returncode == 2, made.stderr
    assert made.stderr.startswith("retort: ") and made.stderr.count("\n") == 1, made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.jsonl", "zero.jsonl"]


def test_how_many_there_are() -> None:
    cases = [*_settings(), *NUMBERS, *_methods(), *WORDS, *DATA, *TOML, *CONFIGS]
    assert len(cases) >= 350
