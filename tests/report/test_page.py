import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_page import Fragment, Page

from retort.errors import UserError
from retort.report import build_report
from retort.report.axes import label, nice_step
from retort.report.plots import Series, plot
from retort.report.rollouts import scale

MakeRun = Callable[..., Path]
ATTACK = "<script>alert(1)</script>"


def test_a_run_becomes_one_well_formed_page(tmp_path: Path, make_run: MakeRun) -> None:
    out = build_report([make_run(tmp_path / "run")], tmp_path / "deep" / "report.html")
    page = Page(out)
    assert out.parent.name == "deep"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert "Entropy-Aware On-Policy Distillation of Language Models" in page.text
    assert "avg@8 rose from 31.2\u202f% to 58.0\u202f%; the teacher reaches 69.0\u202f%" in page.text
    assert "71\u202f% of the gap" in page.text
    assert "[28.2, 34.2]" in page.text
    for title in ("Loss", "Reverse KL", "Forward KL", "Entropy", "Gate open", "Length", "Truncated", "pass@k"):
        assert title in page.plots()
    assert len(page.plots()["Entropy"]["series"]) == 2
    for title in ("Entropy of each token", "Forward KL along the completion", "Forward KL by the teacher’s entropy"):
        assert title in page.plots()
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    shown = page.rollouts()
    assert [row["step"] for row in shown["training"]] == list(range(1, 121, 4))
    assert [[answer["who"] for answer in problem["answers"]] for problem in shown["held_out"]] == 2 * [
        ["student before", "student after", "teacher"]
    ]
    assert "missing" not in page.text


def test_the_page_loads_nothing(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(build_report([make_run(tmp_path / "run")], tmp_path / "report.html"))
    assert not re.search(r"(src|href|srcset|action|poster|data|xmlns)\s*=\s*[\"']?\s*(https?:)?//", page.raw)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page.raw)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base", "form"}
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_whatever_a_model_wrote_is_escaped(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(
        tmp_path / "run",
        prompt=f"prompt {ATTACK}",
        text=f"text {ATTACK}",
        tokens=["a", ATTACK, '" onmouseover="alert(1)', "\ud800"],
        columns={'"><b>': [1.0, 2.0, None, 0.5]},
        prompt_id=ATTACK,
        status=ATTACK,
        source=ATTACK,
    )
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"student": ATTACK, "data": "</pre>" + ATTACK, ATTACK: 1}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, f"loss/{ATTACK}": 0.5, "eval/<b>@1": 1}))
    results = json.loads((run / "eval.json").read_text())
    results |= {"task": ATTACK, "pass_at": {ATTACK: {"1": 0.5, ATTACK: 1}}}
    results["rows"][0] |= {"who": ATTACK, ATTACK: {"value": 1.0}}
    (run / "eval.json").write_text(json.dumps(results))

    page = Page(build_report([run], tmp_path / "report.html"))
    assert ATTACK not in page.raw
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.rollouts()["training"][0]["prompt"] == f"prompt {ATTACK}"
    assert page.rollouts()["training"][0]["tokens"][1] == ATTACK
    assert page.text.count(ATTACK) > 5
    assert page.raw.count("</script>") == 2


def test_missing_files_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    for name in ("eval.json", "rollouts.jsonl", "config.json"):
        (run / name).unlink()
        page = Page(build_report([run], tmp_path / "report.html"))
        assert f"{name} is missing." in page.text
    assert "Reverse KL" in page.plots()


def test_torn_lines_and_numbers_that_are_none_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=8)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.125}\n{"step": 9, "loss": NaN, "grad_norm": "inf"}\n{"step": 10, "lo')
    (run / "eval.json").write_text("[1, 2]")
    (run / "rollouts.jsonl").write_text("")
    page = Page(build_report([run], tmp_path / "report.html"))
    assert "metrics.jsonl: left out 1 line that is not JSON." in page.text
    assert "loss is not finite at step 9" in page.text
    assert "grad_norm is not finite at step 9" in page.text
    assert "eval.json is not a JSON object." in page.text
    assert "rollouts.jsonl is empty." in page.text
    loss = page.plots()["Loss"]
    assert loss["series"][0]["y"][loss["at"].index("8")] == 0.125, "the later line of a step counts"


def test_two_runs_overlay_in_the_same_plots(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", seed=1, method="opd")]
    page = Page(build_report(runs, tmp_path / "report.html"))
    assert "2 runs: a/run, b/run" in page.text
    answers = page.rollouts()["held_out"][0]["answers"]
    assert [answer["who"] for answer in answers] == [
        "student before, a/run",
        "student after, a/run",
        "student after, b/run",
        "teacher",
    ], "what both runs share stands there once"
    assert len(page.plots()["Reverse KL"]["series"]) == 2
    assert len(page.plots()["Entropy"]["series"]) == 4
    assert page.raw.count("<caption>") == 1
    assert "One seed each" in page.text
    assert "method.name" in page.text, "the settings that differ are listed"


def test_runs_with_different_metrics_overlay(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (runs[1] / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "own": 2.0}\n')
    (runs[1] / "eval.json").unlink()
    page = Page(build_report(runs, tmp_path / "report.html"))
    assert len(page.plots()["Loss"]["series"]) == 4
    assert len(page.plots()["own"]["series"]) == 1


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_is_refused(made: bool, tmp_path: Path) -> None:
    if made:
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="holds no run" if made else "there is no folder"):
        build_report([tmp_path / "x"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("rough", "whole", "step"), [(0.23, False, 0.25), (0.3, False, 0.5), (2.1, True, 5), (0.2, True, 1)]
)
def test_steps_between_ticks_are_round(rough: float, whole: bool, step: float) -> None:
    assert nice_step(rough, whole=whole) == pytest.approx(step)


@pytest.mark.parametrize(
    ("value", "kind", "step", "text"),
    [
        (0.0, "number", 0.5, "0"),
        (0.75, "number", 0.25, "0.75"),
        (-1.0, "number", 0.5, "−1.0"),
        (-1e-17, "share", None, "0.0\u202f%"),
        (3e-5, "number", 1e-5, "3e−5"),
        (1234567.0, "number", None, "1.2e6"),
        (4000.0, "number", 250.0, "4,000"),
        (0.9925, "share", 0.0025, "99.25\u202f%"),
        (0.5, "share", 0.25, "50\u202f%"),
        (0.123, "share", None, "12.3\u202f%"),
    ],
)
def test_numbers_get_the_digits_they_need(value: float, kind: Any, step: float | None, text: str) -> None:
    assert label(value, kind, step) == text


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-1.0, 1.0], [1e-300, 2e-300], [1e12, 2e12], [-3.0, -3.0], [0.999]]
)
def test_any_range_can_be_plotted(values: list[float]) -> None:
    drawn = plot("T", "nats", [Series("", list(enumerate(values, 1)))])
    assert "nan" not in drawn
    places = [float(y) for y in re.findall(r'cy="([\d.−-]+)"', drawn)]
    assert len(places) == len(values)
    assert all(10 - 0.1 <= y <= 170.1 for y in places)


def test_long_curves_are_thinned() -> None:
    drawn = plot("T", "", [Series("", [(float(step), 1.0) for step in range(50_000)])])
    assert len(drawn) < 60_000


def test_bands_that_reach_far_beyond_the_curve_do_not_flatten_it() -> None:
    points = [(float(x), 1.0 + 0.1 * x) for x in range(5)]
    data = json.loads(
        Fragment(plot("T", "", [Series("", points, band=[(-90.0, 90.0)] * 5)])).all("svg")[0]["data-plot"] or ""
    )
    assert max(data["series"][0]["high"]) < 2.5
    assert min(data["series"][0]["low"]) >= 0


def test_a_logarithmic_histogram_leaves_out_empty_bins() -> None:
    drawn = plot("T", "", [Series("", [(0.0, 0.9), (0.1, 0.0), (0.2, 0.001)])], log=True, stairs=0.1, kind="share")
    assert drawn.count("M") == 2, "a gap where the empty bin is"
    assert "100\u202f%" in drawn
    assert "0.1\u202f%" in drawn


def test_the_darkest_shade_is_that_of_the_95th_percentile() -> None:
    assert scale([0.0, 0.0, 1.0, -2.0]) == 2.0
    assert scale([float(x) for x in range(101)]) == 96.0
    assert scale([0.0]) == 1.0


@pytest.mark.slow
def test_a_large_run_is_sampled_and_the_page_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    line = (run / "rollouts.jsonl").read_text().split("\n")[0]
    row = json.loads(line)
    row["tokens"], row["columns"] = row["tokens"] * 30, {name: x * 30 for name, x in row["columns"].items()}
    before, after = json.dumps(row | {"step": 0}).split('"step": 0', 1)  # encoding all of them would take seconds
    with (run / "rollouts.jsonl").open("w") as file:
        for step in range(1, 2001):
            file.write(f'{before}"step": {step}{after}\n')
    out = build_report([run], tmp_path / "report.html")
    page = Page(out)
    shown = page.rollouts()["training"]
    assert out.stat().st_size < 10_000_000
    assert len(shown) > 30
    assert (shown[0]["step"], shown[-1]["step"]) == (1, 2000)
    assert f"{len(shown)} of 2,000 recorded rollouts" in page.text
    assert "each cut after 2,000 tokens" not in page.text


def test_long_rollouts_are_cut_and_the_page_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", tokens=["a"] * 2500, columns={"teacher_entropy": [1.0] * 2500})
    page = Page(build_report([run], tmp_path / "report.html"))
    row = page.rollouts()["training"][0]
    assert (len(row["tokens"]), len(row["values"]["teacher_entropy"]), row["more"]) == (2000, 2000, 500)
    assert "each cut after 2,000 tokens" in page.text


def test_a_teacher_that_solves_nothing_does_not_lead_the_page(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    found = json.loads((run / "eval.json").read_text())
    for row, kl in zip(found["rows"], (0.778, 0.53, 0.0), strict=True):
        row["reverse_kl"] = {"value": kl, "low": kl - 0.05, "high": kl + 0.05}
    (run / "eval.json").write_text(json.dumps(found))
    able = Page(build_report([run], tmp_path / "able.html")).text
    assert able.index("avg@8 rose from") < able.index(
        "Reverse KL to the teacher fell from 0.778 to 0.530 nats a token."
    )
    found["rows"][2]["avg@8"] = {"value": 0.0, "low": 0.0, "high": 0.1}
    (run / "eval.json").write_text(json.dumps(found))
    unable = Page(build_report([run], tmp_path / "unable.html")).text
    assert unable.index("Reverse KL to the teacher fell") < unable.index("avg@8 rose from")
