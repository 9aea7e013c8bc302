"""Runs on different data: their numbers stand in tables of their own, and the page says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_page import Page

from retort.cli import main
from retort.report import build_report
from retort.report.alike import _HOW, _value

MakeRun = Callable[..., Path]
ALONE = "each in a table of its own"


@pytest.fixture
def make(tmp_path: Path, make_run: MakeRun) -> Callable[..., Path]:
    """A run on data of one's own, with the digests that its files hold."""

    def made(
        name: str,
        held_out: str | None = "h",
        learnt: str | None = "l",
        settings: dict[str, Any] | None = None,
        **run: Any,
    ) -> Path:
        folder = make_run(tmp_path / name, **run)
        config = json.loads((folder / "config.json").read_text())
        config |= {"data": "/data/a/train.jsonl", "eval": {"data": "/data/a/test.jsonl"}}
        (folder / "config.json").write_text(json.dumps(config | (settings or {})))
        table = json.loads((folder / "eval.json").read_text())
        (folder / "eval.json").write_text(json.dumps(table | ({"held_out": held_out} if held_out else {})))
        if learnt:
            (folder / "checkpoints" / "step-4").mkdir(parents=True)
            (folder / "checkpoints" / "step-4" / "state.json").write_text(json.dumps({"data": learnt}))
        return folder

    return made


def page_of(tmp_path: Path, *runs: Path) -> Page:
    return Page(build_report(runs, tmp_path / "report.html"))


def tables(page: Page) -> int:
    return sum(region.get("aria-label") == "Results" for region in page.all("div"))


def test_the_same_data_needs_no_words(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a"), make("b", method="opd"))
    assert tables(page) == 1
    assert not any(item.get("class") == "remarks" for item in page.all("ul"))
    assert "problems of test.jsonl" in page.text


def test_other_held_out_prompts_stand_in_a_table_of_their_own(tmp_path: Path, make: Callable[..., Path]) -> None:
    other = {"eval": {"data": "/data/b/test.jsonl"}}
    page = page_of(tmp_path, make("a"), make("b", method="opd"), make("c", "other", settings=other))
    assert tables(page) == 2
    assert f"Not evaluated alike, so {ALONE}: a and b on a/test.jsonl; c on b/test.jsonl." in page.text
    assert "On b/test.jsonl: avg@8 (before 31.2" in page.text
    assert page.text.count("pass@k") >= 2
    assert "Accuracy during the run, on b/test.jsonl" in page.plots()
    # The teacher of one table is not that of the other.
    assert page.text.count("Metricabteacher") == 1 and page.text.count("Metriccteacher") == 1


def test_a_file_that_changed_in_between_is_other_data(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a"), make("b", "changed", "changed", method="opd"))
    assert tables(page) == 2
    assert "a on test.jsonl (1); b on test.jsonl (2)." in page.text
    assert "a and b learnt from not the same prompts of train.jsonl." in page.text


def test_other_training_data_is_said(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a"), make("b", learnt="m", settings={"data": "/data/b/train.jsonl"}))
    assert tables(page) == 1
    assert "a and b learnt from different data (a/train.jsonl and b/train.jsonl)." in page.text


def test_runs_without_digests_are_not_called_the_same(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a"), make("b", None, None, method="opd"))
    assert tables(page) == 1
    assert "Whether a and b were evaluated on the same prompts of test.jsonl is not known" in page.text
    assert "Whether a and b learnt from the same prompts of train.jsonl is not known" in page.text


def test_each_seed_may_hold_out_its_own(tmp_path: Path, make: Callable[..., Path]) -> None:
    runs = [make(f"s{seed}", f"h{seed}", f"l{seed}", {"eval": {"data": None}}, seed=seed) for seed in range(2)]
    page = page_of(tmp_path, *runs)
    assert tables(page) == 1
    assert "were evaluated on other prompts of train.jsonl: each seed holds out its own" in page.text
    assert "problems held out of train.jsonl" in page.text


def test_another_way_of_judging_is_another_table(tmp_path: Path, make: Callable[..., Path]) -> None:
    ways = [{"eval": {"data": "/data/a/test.jsonl", "temperature": heat}} for heat in (1.0, 0.6)]
    page = page_of(tmp_path, *(make(f"t{index}", settings=way) for index, way in enumerate(ways)))
    assert tables(page) == 2
    assert "t1 on test.jsonl (2), with eval.temperature = 0.6 (there 1.0)" in page.text


def test_every_teacher_has_its_column(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a"), make("b", settings={"teacher": "another"}))
    assert "teacher of ateacher of b" in page.text
    assert "against each run’s own" in page.text


def test_one_id_of_two_files_is_two_problems(tmp_path: Path, make: Callable[..., Path]) -> None:
    one, other = make("a"), make("b", "other", settings={"eval": {"data": "/data/b/test.jsonl"}})
    rows = [json.loads(line) for line in (other / "answers.jsonl").read_text().splitlines()]
    (other / "answers.jsonl").write_text("".join(json.dumps(row | {"prompt": "another"}) + "\n" for row in rows))
    problems = page_of(tmp_path, one, other).rollouts()["held_out"]
    assert sorted({problem["prompt"] for problem in problems if problem["id"] == "held-out-0"}) == [
        "Numbers: 1 2 0. Target: 3.",
        "another",
    ]


def test_seeds_on_a_file_that_changed_are_not_pooled(tmp_path: Path, make: Callable[..., Path]) -> None:
    for seed in range(3):
        make(f"runs/s{seed}", "h" if seed < 2 else "changed", seed=seed)
    page = page_of(tmp_path, tmp_path / "runs")
    assert "2 experiments, 3 runs" in page.text


def test_a_difference_without_spread_is_no_certainty(tmp_path: Path, make: Callable[..., Path]) -> None:
    for method in ("opd", "eopd"):
        for seed in range(2):
            make(f"runs/{method}-{seed}", seed=seed, method=method)
    page = page_of(tmp_path, tmp_path / "runs")
    assert "within each of 2 seeds (weak): avg@8 0.0 points in each of them" in page.text.replace("+", "")
    assert "[0.0, 0.0]" not in page.text.replace("+", "")


def test_what_was_not_asked_for_is_not_missing(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text()) | {"eval": {"problems": 0}, "record": {"rollouts": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("eval.json", "answers.jsonl", "rollouts.jsonl"):
        (folder / name).unlink()
    page = page_of(tmp_path, folder)
    assert "Nothing was evaluated on held-out prompts (eval.problems = 0)." in page.text
    assert "No rollouts were recorded (record.rollouts = 0)." in page.text
    assert "missing" not in page.text
    assert not any(item.get("class") == "notes" for item in page.all("ul"))


def test_a_conversation_keeps_its_roles(tmp_path: Path, make_run: MakeRun) -> None:
    turns = [["system", "Be <b>brief</b>."], ["user", "1 + 1?"]]
    page = page_of(tmp_path, make_run(tmp_path / "run", messages=turns))
    assert page.rollouts()["training"][0]["turns"] == turns


def test_names_that_would_be_obeyed_are_shown(tmp_path: Path, make: Callable[..., Path]) -> None:
    page = page_of(tmp_path, make("a\u202eb", settings={"student": "x\x1b[31m"}), make("c"))
    assert "\u202e" not in page.text and "\x1b" not in page.raw
    assert "a\\u202eb" in page.text and "x\\x1b[31m" in page.text


def test_a_page_about_other_runs_is_not_replaced(
    tmp_path: Path, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        make_run(Path(name), steps=4)
    assert main(["report", "a", "b"]) == 0
    before = Path("report.html").read_bytes()
    assert main(["report", "a", "b"]) == 0
    assert main(["report", "a", "c"]) == 2
    assert "report.html exists and is about other runs" in capsys.readouterr().err
    assert Path("report.html").read_bytes() == before
    assert main(["report", "a", "c", "--out", "report.html"]) == 0
    assert Path("report.html").read_bytes() != before


def test_a_setting_that_was_left_open_is_not_called_none() -> None:
    assert _value("task", "exact") == "exact"
    for name in _HOW:
        assert "None" not in _value(name, None)
