"""Damaged files of a run: the report names what it leaves out and goes on; a resume refuses in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.cli import main
from retort.errors import UserError
from retort.files import parse_object
from retort.report import build_report
from retort.report.read import number
from retort.train import runner
from retort.train.output import results
from retort.train.storage import checkpoint

MakeRun = Callable[..., Path]
DEEP = "[" * 500 + "]" * 500
DAMAGE = {
    "empty": b"",
    "torn": b'{"step": 1, "k": 8, "rows": [{"who": "stu',
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "text": b'"words"',
    "nul": b"\0" * 100,
    "not utf-8": b'{"step": 1, "who": "\xff"}\n',
    "utf-16": json.dumps({"step": 1}).encode("utf-16"),
    "deep": f'{{"step": 1, "rows": {DEEP}}}'.encode(),
    "endless": b'{"step": 1, "k": ' + b"[" * 100_000,
    "many digits": b'{"step": ' + b"9" * 5000 + b"}",
}
#: JSON objects all the same, with values that nobody expects.
ODD = {
    "huge": {"step": 10**400, "loss": 1e308, "seed": {"a": [1]}, "rows": [{"who": "student after", "avg@8": 1e308}]},
    "huge cells": {
        "rows": [
            {"who": who, "avg@8": {"value": 1e308, "low": -1e308, "high": 10**400}, "length": {"value": 5e-324}}
            for who in ("student before", "student after", "teacher")
        ],
        "pass_at": {"student after": {"1": 1e308, "9" * 400: 1, "2": -1e308}},
        "predictors": {"a": 1},
        "bins": {"position": [{"at": 1e308, "viable": 1e308, "viable_low": -1e308, "viable_high": 1e308}] * 2},
    },
    "wrong types": {
        **dict.fromkeys(("rows", "pass_at", "profile", "gap_recovered", "predictors", "bins", "method", "seed"), 3),
        **{name: [1] for name in ("step", "prompt", "tokens", "columns", "who", "k", "branches", "view")},
    },
    "nothing": {},
    "profile": {
        "profile": {"student after": {"histogram": {"from": [0, 0], "student_entropy": [-1, 1]}}},
        "rows": [{"who": {"a": 1}, "x": {}}, 3, None],
    },
}
FILES = ("metrics.jsonl", "eval.json", "trust.json", "answers.jsonl", "config.json", "rollouts.jsonl")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_the_report_goes_on_without_a_damaged_file(
    tmp_path: Path, make_run: MakeRun, file: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=8)
    (run / file).write_bytes(DAMAGE[kind])
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().err.strip()
    page = (run / "report.html").read_text()
    assert file in page, "the page says it"
    if file.endswith(".jsonl") and kind == "empty":
        assert not said, "nothing was left out"
    else:
        assert file in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ODD)
def test_the_report_draws_what_it_can_of_odd_values(tmp_path: Path, make_run: MakeRun, file: str, kind: str) -> None:
    runs = [make_run(tmp_path / name, steps=8, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        (run / file).write_text(json.dumps(ODD[kind]) + "\n")
    assert build_report(runs[:1], tmp_path / "one.html").stat().st_size > 1000
    assert build_report(runs, tmp_path / "two.html").stat().st_size > 1000
    assert build_report([tmp_path], tmp_path / "grouped.html").stat().st_size > 1000


@pytest.mark.parametrize("file", ["metrics.jsonl", "answers.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "empty"])
def test_a_damaged_line_in_the_middle_costs_that_line(tmp_path: Path, make_run: MakeRun, file: str, kind: str) -> None:
    whole = make_run(tmp_path / "whole", steps=8)
    run = make_run(tmp_path / "run", steps=8)
    lines = (run / file).read_bytes().splitlines()
    bad = DAMAGE[kind].replace(b"\n", b"")
    (run / file).write_bytes(b"\n".join([lines[0], bad, *lines[1:]]) + b"\n")
    said: list[str] = []
    shown = [build_report([one], tmp_path / f"{one.name}.html", said.append).read_text() for one in (whole, run)]
    assert len(said) == 1
    assert f"{file}: left out 1 line that is not JSON. (line 2 " in said[0]
    data = [page.split('id="rollout-data">')[1].split("</script>")[0] for page in shown]
    assert data[0].replace("whole", "run") == data[1]


def test_a_run_of_which_nothing_is_left_is_refused(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=8)
    for file in run.iterdir():
        file.write_bytes(b"\0\n")
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err.strip()
    assert "nothing of this run can be read" in said
    assert len(said.splitlines()) == 1


def test_long_answers_keep_within_the_page(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=8)
    rows = [
        {"who": "student after", "prompt_id": str(n), "prompt": "x" * 1_000_000, "tokens": ["a"]} for n in range(12)
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report([run], tmp_path / "report.html")
    assert page.stat().st_size < 6_000_000
    assert "of 12 held-out problems" in page.read_text()


def test_numbers_that_can_be_drawn() -> None:
    assert [number(x) for x in (1e308, -1e308, 10**400, float("nan"), float("inf"), True, "1", None)] == [None] * 8
    assert [number(x) for x in (3, -0.5, 5e-324, 1e100)] == [3.0, -0.5, 0.0, 1e100]


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_reader_says_what_is_wrong_in_one_line(kind: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_object(DAMAGE[kind])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 120


# --- resuming ---


@pytest.fixture
def finished(tiny_run: dict[str, Any], tmp_path: Path) -> Path:
    settings = configuration.merge(tiny_run, {"steps": 2, "checkpoint": {"every": 1}})
    runner.start(configuration.resolve(settings), tmp_path / "run").go()
    return tmp_path / "run"


def test_a_resume_refuses_every_damaged_file_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, content in DAMAGE.items():
        for file in ("config.json", "checkpoints/step-2/manifest.json", "checkpoints/step-2/state.json"):
            run = tmp_path / "copy"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(finished, run)
            (run / file).write_bytes(content)
            assert main(["train", "--resume", str(run), "--steps", "3"]) == 2, (kind, file)
            said = capsys.readouterr().err.strip()
            assert Path(file).name in said, (kind, file, said)
            assert len(said.splitlines()) == 1, (kind, file, said)


def test_a_state_that_was_written_wrongly_is_refused_though_its_digest_fits(finished: Path) -> None:
    place = finished / "checkpoints" / "step-2"
    good = json.loads((place / "state.json").read_text())
    changes: list[Any] = [
        {name: odd} for name in ("step", "updates", "best", "advised", "data", "run", "owes_probe") for odd in (3.5, {})
    ]
    for changed in [*changes, {"run": {"settings": 1}}, {"models": 3.5}, {"best": [1]}, {"step": 10**400}]:
        written = json.dumps({**good, **changed}).encode()
        _with_digest(place, "state.json", written)
        with pytest.raises(UserError, match=r"state\.json .*--resume .*step-1"):
            checkpoint.load(place)
    for kind, content in DAMAGE.items():
        _with_digest(place, "state.json", content)
        with pytest.raises(UserError, match=r"state\.json"):
            checkpoint.load(place)
        _with_digest(place, "state.json", json.dumps(good).encode())
        weights = (place / "weights.safetensors").read_bytes()
        _with_digest(place, "weights.safetensors", content)
        with pytest.raises(UserError, match=r"weights\.safetensors cannot be read"):
            checkpoint.load(place)
        _with_digest(place, "weights.safetensors", weights)
        assert checkpoint.load(place).step == 2, kind


def _with_digest(place: Path, name: str, content: bytes) -> None:
    (place / name).write_bytes(content)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, name: checkpoint._digest(place / name)}))


@pytest.mark.parametrize("kind", [*DAMAGE, *ODD])
def test_a_damaged_table_is_refused_before_anything_is_learnt(tmp_path: Path, kind: str) -> None:
    config = configuration.resolve({"data": "countdown"})
    path = tmp_path / "eval.json"
    path.write_bytes(DAMAGE[kind] if kind in DAMAGE else json.dumps(ODD[kind]).encode())
    with pytest.raises(UserError, match=r"eval\.json: .*; put the file back") as caught:
        results.read(tmp_path, None, config)
    assert "\n" not in str(caught.value)


def test_damaged_lines_of_answers_cost_no_table(tmp_path: Path) -> None:
    config = configuration.resolve({"data": "countdown"})
    kept = json.dumps({"who": results.TEACHER, "text": "x"}).encode()
    bad = [content.replace(b"\n", b"") for content in DAMAGE.values()]
    (tmp_path / "answers.jsonl").write_bytes(b"\n".join([*bad, kept, b'{"who": 3}', b'{"who": "student a']))
    cell = {"value": 0.5, "low": 0.1, "high": 0.9}
    table = results.read(tmp_path, None, config)
    results.add(tmp_path, table, results.AFTER, {"avg@8": cell, "answers": [{"text": "y"}]})
    lines = (tmp_path / "answers.jsonl").read_bytes().split(b"\n")
    good = [json.loads(line) for line in (kept, lines[-2])]
    assert good == [{"who": results.TEACHER, "text": "x"}, {"who": results.AFTER, "text": "y"}]
    # Nothing is thrown away, the damage least of all: the report names it.
    assert lines == [*(line for line in bad if line), kept, b'{"who": 3}', b'{"who": "student a', lines[-2], b""]
    assert results.has(results.read(tmp_path, None, config), results.AFTER)
