"""The benchmark of two tokenizers: every model is judged alike, and the tables hold what was measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retort import config

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cross_tokenizer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs that ended and one that goes on, as an older version could have left them."""
    for name, student, teacher in (("uld", "s", "t"), ("simct", "s", "t"), ("same", "cut", "s")):
        own = tmp_path / name
        (own / "model").mkdir(parents=True)
        settings = {"student": f"/models/{student}", "teacher": f"/models/{teacher}", "task": None}
        (own / "config.json").write_text(json.dumps({**settings, "rollout": {"stop": ["###"], "thinking": None}}))
        row = {"tokens": 60, "time/generate": 2.0, "time/step": 4.0}
        (own / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
        if name != "simct":
            (own / "model" / "config.json").write_text("{}")
    return tmp_path


def call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cross_tokenizer.py", *words])
    return bench.main()


def spoken(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Takes the place of `retort eval`; each call is worth one nat more."""
    heard: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        heard.append(words[3:])
        value = {"value": float(len(heard)), "low": 0.5, "high": 9.0}
        row = {"who": words[4], "avg@2": {"value": 0.25, "low": 0.1, "high": 0.5}}
        row |= {"reverse_kl_per_byte": value} if "--teacher" in words else {}
        row |= {"bytes_in_units": {"value": 0.975, "low": 0.9, "high": 1.0}} if "/models/t" in words else {}
        table = {"k": 2, "problems": 6, "graded": 4, "rows": [row]}
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(table))

    monkeypatch.setattr(subprocess, "run", run)
    return heard


def test_every_model_is_judged_once_and_by_the_same_words(
    bench: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = spoken(monkeypatch)
    words = ("judge", str(folder), "--held-out", "held.jsonl", "samples=4")
    assert call(bench, monkeypatch, *words) == 0
    models = [line[1] for line in heard]
    assert models == ["/models/s", str(folder / "uld/model"), "/models/cut", str(folder / "same/model")]
    shared = {tuple(word for word in line if "=" in word) for line in heard}
    assert len(shared) == 1, "seed, prompts and sampling are those of all"
    (shared_words,) = shared
    assert {"temperature=1", "top_p=1", "seed=0", 'rollout.stop=["###"]'} <= set(shared_words)
    assert shared_words[-1] == "samples=4"
    assert config.overrides(shared_words)["rollout"]["stop"] == ["###"]
    assert call(bench, monkeypatch, *words) == 0
    assert len(heard) == 4, "what was judged is not judged again"
    assert call(bench, monkeypatch, *words[:-1], "samples=8") == 0
    assert len(heard) == 8


def test_the_tables(
    bench: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken(monkeypatch)
    bench.note(folder / "uld", 3 * 2**30)
    bench.note(folder / "uld", 2**30)
    call(bench, monkeypatch, "judge", str(folder), "--held-out", "held.jsonl", "--teachers")
    capsys.readouterr()
    assert call(bench, monkeypatch, "table", str(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == ["simct", "uld", "same"] * 2
    assert "| s ← t | 3 | 1.000 [0.500, 9.000] | – | – |" in rows[0]
    assert "3.000 [0.500, 9.000] | 97.5% [90.0%, 100.0%] | 25.0% [10.0%, 50.0%] |" in rows[1]
    assert "| cut ← s | 3 | " in rows[2]
    assert "| 100%, by tokens |" in rows[2]
    assert rows[4].startswith("| `uld` | 180 | 30.0 | – |")
    assert rows[4].endswith("| 15.0 | 3.00 |")
    assert "6 held-out prompts, 4 of them graded, 2 completions each; 95 % intervals over prompts." in lines
    call(bench, monkeypatch, "judge", str(folder), "--held-out", "other.jsonl", "samples=1")
    capsys.readouterr()
    assert call(bench, monkeypatch, "table", str(folder)) == 1, "the teachers are not judged like the students"


def test_a_run_is_started_with_settings_that_there_are(
    bench: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(bench, "train", lambda given: started.extend(bench.training(n, given) for n in given.only) or 0)
    words = ("train", str(folder), "--student", "S", "--teacher", "T", "--cut", "C", "--data", "D", "steps=3")
    assert call(bench, monkeypatch, *words, "--only", "opd,same,simct") == 0
    opd, _, simct = started
    assert opd[:7] == ["train", "--method", "opd", "--student", "S", "--teacher", "T"]
    assert simct == ["train", "--resume", str(folder / "simct")]
    given = config.overrides([word for word in opd if "=" in word])
    assert config.resolve({"method": {"name": "opd"}, "student": "S", "teacher": "T", "data": "D"}, given).steps == 3
    assert bench.training("same", _arguments(folder / "new"))[1:7] == [
        "--method", "opd", "--student", "C", "--teacher", "S",
    ]  # fmt: skip


def _arguments(folder: Path) -> Any:
    from argparse import Namespace

    return Namespace(folder=folder, student="S", teacher="T", cut="C", data="D", settings=[])
