"""What the page shows of two tokenizers: units, sums over them, their curves; and nothing of it for one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_page import Page

from retort.report import build_report
from retort.report.units import over_unit, sums, units_of

MakeRun = Callable[..., Path]
TOKENS = ["The", " qu", "ick", " fox", "\ufffd", "</s>"]
UNITS: dict[str, Any] = {"teacher": {"sizes": [1, 1, 0, 2, None, 1], "tokens": ["The", " quick", " f", "ox", "<eos>"]}}
COLUMNS = {
    "student_logp": [-1.0, -0.5, -1.5, -2.0, -4.0, -0.25],
    "teacher_logp": [-1.5, -3.0, -3.0, -1.0, 0.0, -0.5],
}


def made(make_run: MakeRun, folder: Path, **more: Any) -> Path:
    return make_run(folder, tokens=TOKENS, columns=COLUMNS, text="".join(TOKENS), **more)


def test_a_unit_has_the_teachers_tokens_and_the_sums_of_both_sides() -> None:
    found = units_of({"units": UNITS}, len(TOKENS), COLUMNS)
    assert found == {
        "teacher": {
            "unit": [0, 1, 1, 2, None, 3],
            "read": [["The"], [" quick"], [" f", "ox"], ["<eos>"]],
            "student": [-1.0, -2.0, -2.0, -0.25],
            "teacher": [-1.5, -6.0, -1.0, -0.5],
        }
    }


@pytest.mark.parametrize(
    "sizes",
    [
        [1, 1, 0, 2, None],  # another number of tokens
        [0, 1, 0, 2, None, 1],  # goes on with a unit that has not begun
        [1, 1, 0, None, 0, 1],  # goes on behind a gap
        "<script>",
        {"0": 1},
    ],
)
def test_units_that_do_not_fit_are_left_out(sizes: Any) -> None:
    assert units_of({"units": {"teacher": {"sizes": sizes, "tokens": []}}}, len(TOKENS), COLUMNS) == {}


@pytest.mark.parametrize("units", [None, [], "x", {"teacher": None}, {"teacher": [1]}])
def test_what_is_no_table_of_units_is_none(units: Any) -> None:
    assert units_of({"units": units}, len(TOKENS), COLUMNS) == {}


def test_texts_of_another_number_are_left_out_and_the_units_stay() -> None:
    found = units_of({"units": {"teacher": UNITS["teacher"] | {"tokens": ["The"]}}}, len(TOKENS), COLUMNS)
    assert "read" not in found["teacher"]
    assert found["teacher"]["unit"] == [0, 1, 1, 2, None, 3]


def test_a_sum_over_what_is_not_known_is_not_known() -> None:
    assert sums([1.0, None, 2.0, 0.5], [0, 0, 1, 1]) == [None, 2.5]
    assert sums(None, [0, 0, 1]) == [None, None]
    assert over_unit([-1.0, -3.0, 5.0, -2.0], [0, 0, None, 1]) == [-2.0, -2.0, None, -2.0]


def test_both_sides_are_compared_by_the_unit(tmp_path: Path, make_run: MakeRun) -> None:
    run = made(make_run, tmp_path / "run", units=UNITS)
    row = Page(build_report([run], tmp_path / "report.html")).rollouts()["training"][0]
    assert row["units"]["teacher"]["read"][1] == [" quick"]
    # The teacher has -6 nats for both tokens of " quick", the student -2: -2 for each. Of the part in no unit: nothing.
    assert row["values"]["teacher − student log-prob"] == [-0.5, -2.0, -2.0, 1.0, None, -0.25]
    assert row["values"]["teacher_logp"] == [-1.5, -3.0, -3.0, -1.0, None, -0.5]
    assert row["values"]["student_logp"] == COLUMNS["student_logp"]


def test_long_rollouts_are_cut_between_the_same_tokens(tmp_path: Path, make_run: MakeRun) -> None:
    units = {"teacher": {"sizes": [1, 0] * 1250, "tokens": ["ab"] * 1250}}
    run = make_run(tmp_path / "run", tokens=["a"] * 2500, columns={"teacher_logp": [-1.0] * 2500}, units=units)
    row = Page(build_report([run], tmp_path / "report.html")).rollouts()["training"][0]
    assert len(row["units"]["teacher"]["unit"]) == len(row["tokens"]) == 2000


def test_curves_of_two_tokenizers(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {
        **{f"view/teacher/{part}": 1 / 3 for part in ("one_to_one", "spans", "unread")},
        **{f"unit_loss/{term}/{kind}": 0.5 for term in ("reverse", "stop") for kind in ("one_to_one", "spans")},
        **{f"stop_probability/{side}": 0.4 for side in ("student", "teacher")},
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    plots = Page(build_report([run], tmp_path / "report.html")).plots()
    labels = {title: [one["name"] for one in plots[title]["series"]] for title in plots}
    assert labels["Loss by kind of unit"] == [
        f"{term}, {kind}" for term in ("reverse", "stop") for kind in ("1:1 units", "longer units")
    ]
    assert labels["Bytes in units"] == ["1:1 units", "longer units", "no unit"]
    assert labels["Stopping where the student stopped"] == ["student", "teacher"]


def test_a_run_of_one_tokenizer_has_none_of_it(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(build_report([made(make_run, tmp_path / "run")], tmp_path / "report.html"))
    assert not page.plots().keys() & {"Loss by kind of unit", "Bytes in units", "Stopping where the student stopped"}
    row = page.rollouts()["training"][0]
    assert "units" not in row
    assert row["values"]["teacher_logp"] == COLUMNS["teacher_logp"]
