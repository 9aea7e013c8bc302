"""The lab: everybody takes part once, runs are read as they were, and the page shows them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retort import config, registry

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("lab")


def test_every_method_takes_part_on_one_bench_with_the_same_models_and_prompts(lab: ModuleType, tmp_path: Path) -> None:
    outside, itself = (lab.BENCHES[name] for name in ("outside", "itself"))
    taking_part = {bench.name: {e.method for e in bench.entries().values()} for bench in (outside, itself)}
    judges = {entry.method for entry in lab.BENCHES["judges"].entries().values()}
    several = {own["method"]["name"] for own in importlib.import_module("debaters").METHODS.values()}
    looking = {entry.method for entry in lab.BENCHES["shapes"].entries().values()}
    denoising = {entry.method for entry in lab.BENCHES["glyphs"].entries().values()}
    newer = {entry.method for entry in lab.BENCHES["beyond"].entries().values()}
    playing = {entry.method for entry in lab.BENCHES["agents"].entries().values()}
    everybody = taking_part["lab"] | taking_part["lab-itself"] | judges | several | looking | denoising
    assert everybody | newer | playing == set(registry.names())
    assert newer & taking_part["lab"] == {"opd", "eopd"}  # controls
    assert denoising - set(registry.for_tokens()) == set(registry.names()) - set(registry.for_tokens())
    assert denoising & set(registry.for_tokens()) == {"sod"}, "its term of rewards alone is GRPO"
    assert looking - taking_part["lab"] == {"va_opd"}
    assert several == {"mad_opd", "mt_opd", "opad"}
    assert several.isdisjoint(taking_part["lab"] | taking_part["lab-itself"])
    assert judges - taking_part["lab"] - taking_part["lab-itself"] == {"ropd"}
    assert taking_part["lab"].isdisjoint({"opsd", "sdpo", "rlsd", "opct", "uni_opd", "dopd"})
    assert taking_part["lab"] & taking_part["lab-itself"] == {"opd", "gkd"}  # controls
    for bench, task in ((outside, "countdown"), (itself, "coached")):
        jobs = list(lab.jobs(bench, tmp_path, (), 3))
        assert len({job.folder for job in jobs}) == len(jobs) == 3 * len(bench.entries())
        own = {"method", "seed", "eval", "teacher", "data", "cold_start"}
        shared = [{k: v for k, v in job.settings.items() if k not in own} for job in jobs]
        tokens = [settings["rollout"].pop("prompts") if "cold_start" in job.settings else 0 for job, settings in
                  zip(jobs, [{**s, "rollout": dict(s["rollout"])} for s in shared], strict=True)]  # fmt: skip
        assert set(tokens) <= {0, 16 * 8}, "one answer each to as many prompts as the others have rollouts"
        alike = [s for s, job in zip(shared, jobs, strict=True) if "cold_start" not in job.settings]
        assert all(settings == alike[0] for settings in alike)
        for job in jobs[: len(bench.entries())]:
            config.resolve(config.recipe(task), job.settings)


def test_benches_with_a_judge_or_with_several_teachers_have_settings_that_hold(lab: ModuleType, tmp_path: Path) -> None:
    for job in lab.jobs(lab.BENCHES["judges"], tmp_path, (), 1, "http://127.0.0.1:1"):
        asked = job.settings["method"]["name"] == "ropd"
        assert job.settings.get("judge") == ({"model": "http://127.0.0.1:1"} if asked else None)
        config.resolve(config.recipe("countdown"), job.settings)
    debaters = importlib.import_module("debaters")
    jobs = debaters.jobs(tmp_path, (), 2, 5)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(debaters.METHODS)
    for job in jobs:
        config.resolve(job.settings)
    alone = [job for job in jobs if job.method == "second teacher"]
    assert {Path(job.settings["teacher"]).name for job in alone} == {"teacher_2"}


def test_the_page_of_images_has_who_looks(lab: ModuleType, tmp_path: Path) -> None:
    jobs = list(lab.jobs(lab.BENCHES["shapes"], tmp_path, (), 3))
    assert len({job.folder for job in jobs}) == len(jobs) == 3 * 4
    assert {job.settings["data"] for job in jobs} == {"shapes"}
    for job in jobs:
        registry.load(**job.settings["method"])
        assert job.settings["method"]["samples"] == 4
    about = lab.about(lab.BENCHES["shapes"])
    rows = [_looked("opd", seed, 0.5, 0.3) for seed in range(3)]
    rows += [_looked("va_opd", seed, 0.6 + 0.01 * seed, 0.5) for seed in range(3)]
    text = sys.modules["lab_shapes_page"].page(rows, about, [*about])
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[1].startswith("| `va_opd` | faithful | 3 | 61.0 ± 2.5 | 16.0 ± 2.5 | 40.0 | 50.0 | 10.0 |")
    assert table[2].startswith("| `opd` | faithful | 3 | 50.0 | 5.0 | 40.0 | 30.0 | 10.0 |")
    assert "| va_opd | 3 | +11.0 [+8.5, +13.5] | +0.0" in text and "+20.0" in text
    assert "Student before: right 45.0 %, on pixelated pictures 40.0 %, changed 10.0 %." in text
    assert "Without a finished run: gkd, gkd, reverse KL." in text


def _looked(method: str, seed: int, right: float, changed: float) -> dict[str, Any]:
    before = {"right_original": 0.45, "right_pixelated": 0.4, "changed_pixelated": 0.1}
    after = {**before, "right_original": right, "changed_pixelated": changed}
    return {
        "method": method, "seed": seed, "before": before, "after": after, "teacher": None, "tokens": 9000,
        "seconds": 20.0,
    }  # fmt: skip


@pytest.mark.parametrize(("bench", "pictures"), [("glyphs", 32), ("plane", 192)])
def test_benches_of_flows_sample_as_much_for_everybody(
    lab: ModuleType, tmp_path: Path, bench: str, pictures: int
) -> None:
    jobs = list(lab.jobs(lab.BENCHES[bench], tmp_path, (), 2))
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        config.resolve(config.recipe(bench), job.settings)
        assert job.settings["rollout"]["prompts"] * job.settings["method"]["samples"] == pictures, job.method
    assert [job.method for job in jobs if job.settings["eval"]["teacher"]] == ["flow_opd"], "it is evaluated once"


def test_the_page_of_a_bench_of_flows(lab: ModuleType) -> None:
    about = lab.about(lab.BENCHES["glyphs"])
    rows = [_denoised("flow_opd", seed, 0.8, 0.6) for seed in range(3)]
    rows += [_denoised("GRPO-mix", seed, 0.7 + 0.01 * seed, 0.5) for seed in range(3)]
    pages = sys.modules["lab_flows_page"]
    text = pages.page(pages.GLYPHS, rows, about, [*about])
    assert "| the mean of the experts | 40.0 | 10.0 | 10.0 | 30.0 |" in text
    assert "| expert `glyph` | 90.0 | 10.0 | 10.0 | 20.0 |" in text
    assert "| `flow_opd` | partial | 3 | 70.0 | 35.0 | 80.0 | 60.0 | 0.500 | 9 | 20 |" in text
    assert "| GRPO-mix | 3 | −9.5 [−10.7, −8.3] | −9.0 [−11.5, −6.5] | −10.0" in text


def _denoised(method: str, seed: int, glyph: float, color: float) -> dict[str, Any]:
    def cells(right: float, other: float) -> dict[str, Any]:
        wrong = {"value": 0.1}
        found = {"glyph": {"glyph": {"value": right}, "color": wrong}}
        return found | {"color": {"glyph": wrong, "color": {"value": other}}}

    after = {"avg@4": (glyph + color) / 2, "reverse_kl": 0.5}
    domains = {"student before": cells(0.4, 0.3), "student after": cells(glyph, color)}
    teachers = {"teacher glyph": {}} if method == "flow_opd" and not seed else {}
    domains |= {who: cells(0.9, 0.2) for who in teachers}
    return {
        "method": method, "seed": seed, "before": {"avg@4": 0.35}, "after": after, "teachers": teachers,
        "by_domain": domains, "curve": [{"step": 60}], "tokens": 9000, "seconds": 20.0,
    }  # fmt: skip


def test_self_taught_methods_get_a_bigger_teacher_only_where_they_ask_for_one(lab: ModuleType, tmp_path: Path) -> None:
    for job in lab.jobs(lab.BENCHES["itself"], tmp_path, (), 1):
        settings = {name: value for name, value in job.settings["method"].items() if name != "name"}
        views = registry.load(job.settings["method"]["name"], **settings).views.values()
        asked = any(view.model == "teacher" for view in views)
        assert asked == ("teacher" in job.settings), job.method
        assert settings["samples"] == 8
        assert job.settings["templates"]["solution"] == "solution {text} ;", "the words that the models know"
    names = lab.BENCHES["itself"].entries()
    page = sys.modules["lab_itself_page"]
    assert {name for one, other, _ in page.PAIRS for name in (one, other)} <= set(names)


def _row(method: str, seed: int, share: float) -> dict[str, Any]:
    before = {"avg@8": 0.2, "pass@8": 0.7, "student_entropy": 0.4, "reverse_kl": 0.6, "forward_kl_uncertain": 0.8}
    after = {**before, "avg@8": share, "student_entropy": 0.1}
    curve = [{"step": 0, "tokens": 0, **before}, {"step": 60, "tokens": 9000, **after}]
    return {
        "method": method, "seed": seed, "before": before, "after": after,
        "teacher": None, "curve": curve, "pass_at": {"student after": {"1": share, "8": 0.9}},
        "tokens": 9000, "seconds": 20.0,
    }  # fmt: skip


def test_the_page_has_the_best_first_with_its_interval_and_names_who_is_missing(lab: ModuleType) -> None:
    rows = [_row("opd", seed, 0.3 + 0.01 * seed) for seed in range(3)] + [_row("eopd", 0, 0.5)]
    about = {name: {"method": name, "note": ""} for name in ("opd", "eopd", "gkd")}
    text = sys.modules["lab_page"].page(rows, about, ["opd", "eopd", "gkd"])
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table[0].startswith("| `eopd` | faithful | 1 | 50.0 |")
    assert table[1].startswith("| `opd` | faithful | 3 | 31.0 ± 2.5 | 70.0 | 25 |")
    assert "Without a finished run: gkd." in text
    bare = _row("gkd", 0, 0.1)
    bare["after"] = {name: bare["after"][name] for name in ("avg@8", "pass@8")}
    unknown = sys.modules["lab_page"].page([*rows, bare], about, ["opd", "eopd", "gkd"])
    assert "| `gkd` | faithful | 1 | 10.0 | 70.0 | – | – | – | 9 | 20 |" in unknown, (
        "what was not measured is no number"
    )
    assert "n = 1 is weak" in text


def _taught(method: str, seed: int, share: float, **more: float) -> dict[str, Any]:
    row = _row(method, seed, share)
    row["before"], row["after"] = ({**row[when], "length": 12.0, **more} for when in ("before", "after"))
    return {**row, "views": {"no_context": None if method == "opd, bigger teacher" else 0.25}}


def test_the_page_of_self_taught_methods_compares_within_seeds(lab: ModuleType) -> None:
    page = sys.modules["lab_itself_page"]
    about = lab.about(lab.BENCHES["itself"])
    rows = [_taught("reward alone", seed, 0.30 + 0.10 * seed) for seed in range(3)]
    rows += [_taught("rlsd", seed, 0.35 + 0.10 * seed) for seed in range(3)]
    rows += [_taught("sdpo", 0, 0.5), _taught("opd, bigger teacher", 0, 0.2)]
    rows += [_taught("opct", 0, 0.6, **{"reward/followed": 0.125})]
    text = page.page(rows, [], about, about, ["opct", "reward alone, misled"])
    first, misled = text.split("## Misled prompts")
    table = [line for line in first.splitlines() if line.startswith("| ")]
    assert table[1].startswith(
        "| `sdpo` | faithful | a right sibling, else feedback | choose what is shown | 1 | 50.0 | 30.0 |"
    )
    assert table[2].startswith("| `rlsd` | faithful | solution | learnt from | 3 | 45.0 ± 24.8 |")
    assert table[4].startswith(
        "| opd, bigger teacher | faithful | nothing | no | 1 | 20.0 | 0.0 | 70.0 | 25 | 12.0 | – |"
    )
    assert "| `opct` |" not in first and "| 12.5 | 12.5 |" in misled
    assert "| rlsd − reward alone | 3 | +5.0 [+5.0, +5.0] | +0.0 [+0.0, +0.0] |" in text
    assert "| sdpo | 1 | +20.0 | +0.0 |" in text, "one seed has no interval"
    assert "n = 1 is weak, and below three seeds there is none" in text
    assert "At a learning rate of 5e-4" not in text
    faster = [_taught("reward alone", 0, 0.1), _taught("opct", 0, 0.6)]
    section = page.page(rows, faster, about, about, ["opct"]).split("## At a learning rate of 5e-4")[1]
    assert "| reward alone | faithful | 1 | 10.0 | −10.0 |".replace("−", "-") in section and "opct" not in section


def test_the_page_of_written_texts_has_each_beside_its_control(lab: ModuleType, tmp_path: Path) -> None:
    bench, page = lab.BENCHES["written"], sys.modules["lab_written_page"]
    entries, runs = bench.entries(), {job.method: job for job in lab.jobs(bench, tmp_path, (), 1)}
    shared = {job.method: job for job in lab.jobs(lab.BENCHES["itself"], tmp_path, (), 1)}
    assert all(shared[name] == dataclasses.replace(job, condition="lab-itself") for name, job in runs.items())
    drafted = {name for name, own in entries.items() if _drafts(own.method, own.settings)}
    assert {one for one, _, _ in page.WROTE} == drafted | {"sdft, teacher writes"}
    rows = []
    for name, share, texts in (("opsd", 0.3, ()), ("opsd, reasons first", 0.4, ("3 + 4 = 7", "3"))):
        folder = tmp_path / name
        folder.mkdir()
        written = {"prompt": "7 from 3 4 :", "passages": [{"text": text} for text in texts]}
        (folder / "rollouts.jsonl").write_text(json.dumps(written) + "\n")
        rows += [{**_taught(name, seed, share), "folder": folder} for seed in range(3)]
    text = page.page(rows, lab.about(bench), entries)
    assert "| opsd, reasons first − opsd | 3 | +10.0 [+10.0, +10.0] | +0.0 [+0.0, +0.0] |" in text
    assert "| opsd, reasons first | 16 rationales a batch | 50 |" in text
    assert "Without a finished run: peer_opd, peer_opd, excerpts" in text


def _drafts(method: str, settings: Mapping[str, Any]) -> bool:
    return any(view.draft is not None for view in registry.load(method, **settings).views.values())


def test_rewards_in_words(lab: ModuleType) -> None:
    about = lab.about(lab.BENCHES["itself"])
    said = {name: about[name]["rewards"] for name in ("opsd", "sdpo", "egrsd", "right answers alone")}
    assert said == {"opsd": "no", "sdpo": "choose what is shown", "egrsd": "learnt from", "right answers alone": "no"}


def test_two_seeds_have_no_interval(lab: ModuleType) -> None:
    between = sys.modules["lab_itself_page"].between
    assert [between(values) for values in ([], [-1.0], [1.0, 2.0])] == ["–", "−1.0", "+1.5"]
    assert between([1.0, 2.0, 3.0]) == "+2.0 [−0.5, +4.5]"


@pytest.mark.slow
def test_a_run_is_read_and_drawn(lab: ModuleType, tmp_path: Path) -> None:
    job = next(iter(lab.jobs(lab.BENCHES["outside"], tmp_path / "runs", ["opd"], 1)))
    small = {**job.settings["eval"], "problems": 12, "every": 1}
    job = dataclasses.replace(job, settings={**job.settings, "steps": 2, "eval": small})
    sys.modules["runs"].run(job)
    rows = lab.read([job])
    assert [point["step"] for point in rows[0]["curve"]] == [0, 1, 2]
    assert rows[0]["tokens"] == rows[0]["curve"][-1]["tokens"] > 2 * 64 * 4 * 5
    assert rows[0]["teacher"]["avg@8"] > rows[0]["before"]["avg@8"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: benchmarks)")
    lab.plots(rows, tmp_path)
    for name in ("accuracy", "pass-at-k", "entropy"):
        assert "<svg" in (tmp_path / f"lab-{name}.svg").read_text()


def _episodes(method: str, seed: int, success: float) -> dict[str, Any]:
    cells = {"success": 0.4, "turns": 9.0, "tool_errors": 0.5, "reverse_kl": 0.5, "student_entropy": 0.2}
    by_turn = {"from": [1, 2, 3], "tokens": [900, 600, 2], "reverse_kl": [0.1, 0.25, 7.0]}
    return {
        "method": method, "seed": seed, "before": cells, "after": {**cells, "success": success},
        "teacher": {**cells, "success": 0.9}, "tokens": 5000, "seconds": 30.0,
        "profile": {"student before": {"by_turn": by_turn}, "student after": {"by_turn": by_turn}},
    }  # fmt: skip


def test_the_page_of_agents_has_success_and_the_divergence_by_turn(lab: ModuleType) -> None:
    jobs = list(lab.jobs(lab.BENCHES["agents"], Path("runs"), (), 1))
    assert {"opd", "eopd", "tcod", "reopd", "sod", "atod"} == {job.settings["method"]["name"] for job in jobs}
    assert [job.method for job in jobs if job.settings["method"].get("coef") == 0.0] == ["reward alone"]
    for job in jobs:
        settings = config.resolve(config.recipe("rooms"), job.settings)
        assert settings.rollout.prompts * job.settings["method"]["samples"] == 48, "as many episodes for everybody"
    about = {name: {"method": "tcod" if "tcod" in name else name, "note": ""} for name in ("opd", "tcod, forward")}
    rows = [_episodes("opd", seed, 0.5) for seed in range(3)]
    rows += [_episodes("tcod, forward", seed, 0.6 + 0.01 * seed) for seed in range(3)]
    text = sys.modules["lab_agents_page"].page(rows, about, [*about, "sod"])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| tcod, forward | faithful | 3 | 61.0 ± 2.5 | 21.0 ± 2.5 | 9.0 | 0.50 |")
    assert any(line.startswith("| student before | 0.100 | 0.250 | – |") for line in lines), "two tokens say nothing"
    assert "| tcod, forward | 3 | +11.0 [+8.5, +13.5] | +0.0" in text
    assert "success 90.0 %" in text and "Without a finished run: sod." in text
