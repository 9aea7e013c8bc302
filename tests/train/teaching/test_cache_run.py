"""Runs with a cache of their teachers' scores: the same numbers to the last bit, with the teacher, or without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import make_model_of

from retort import Stop
from retort import config as configuration
from retort.cli.commands import main
from retort.cli.score import score
from retort.errors import UserError
from retort.models.files import read_model
from retort.preflight.doctor import examine
from retort.train import runner
from retort.train.runner import Run
from retort.train.setup.prepare import prepare

RATE = "teacher_cache/hit_rate"


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., Path], prompts_file: Path) -> dict[str, Any]:
    return {
        "student": str(model_folder(seed=1)),
        "teacher": str(model_folder(seed=2, hidden_size=24, padded_to=64)),
        "data": str(prompts_file),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 3,
        "rollout": {"prompts": 4, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-2, "updates": 2, "batch_tokens": 64},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
        "record": {"overlap": 4, "overlap_every": 2},
    }


def run(base: dict[str, Any], out: Path, *more: dict[str, Any], callbacks: tuple[Any, ...] = ()) -> Run:
    found = runner.start(configuration.resolve(base, *more), out)
    found.callbacks = callbacks
    return found.go()


def same(one: Run, other: Run) -> bool:
    """Weights and losses, to the last bit."""
    pairs = zip(one.student.model.parameters(), other.student.model.parameters(), strict=True)
    losses = [[row["loss"] for row in own.metrics] for own in (one, other)]
    return losses[0] == losses[1] and all(torch.equal(mine, theirs) for mine, theirs in pairs)


def rates(own: Run) -> list[float | None]:
    return [row.get(RATE) for row in own.metrics]


#: One for each kind of signal: sampled log-probs, a top-k, whole distributions; and a base model.
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"name": "opd"},
    "topk_score": {"name": "topk_score"},
    "eopd": {"name": "eopd"},
    "exopd": {"name": "exopd"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_a_cache_is_the_run_without_it(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    method = {"method": METHODS[name]}
    with_cache = {"cache": {"dir": str(tmp_path / "cache")}}
    plain, first = run(base, tmp_path / "plain", method), run(base, tmp_path / "first", method, with_cache)
    second = run(base, tmp_path / "second", method, with_cache)
    assert same(plain, first)
    assert same(plain, second)
    assert rates(plain) == [None] * 3
    assert set(rates(second)) == {1.0}
    assert rates(first)[0] == 0.0


def test_a_cached_run_resumes_to_the_last_bit(base: dict[str, Any], tmp_path: Path) -> None:
    """Also with another cache: where scores lie is not a part of what is learnt."""

    class StopAtTwo:
        def on_step(self, run: Run, metrics: dict[str, Any]) -> Stop | None:
            return Stop("enough") if run.step == 2 else None

    more = {"method": {"name": "gkd"}, "cache": {"dir": str(tmp_path / "cache")}}
    whole = run(base, tmp_path / "whole", more)
    run(base, tmp_path / "part", more, callbacks=(StopAtTwo(),))
    assert same(runner.resume(tmp_path / "part").go(), whole)
    run(base, tmp_path / "moved", more, callbacks=(StopAtTwo(),))
    settings = tmp_path / "moved" / "config.json"
    settings.write_text(settings.read_text().replace(str(tmp_path / "cache"), str(tmp_path / "elsewhere")))
    again = runner.resume(tmp_path / "moved").go()
    assert same(again, whole)
    assert rates(again) == [1.0, 1.0, 0.0]


def test_a_damaged_shard_is_scored_again_and_counted(base: dict[str, Any], tmp_path: Path) -> None:
    more = {"method": {"name": "opd"}, "cache": {"dir": str(tmp_path / "cache")}}
    first = run(base, tmp_path / "first", more)
    paths = sorted((tmp_path / "cache" / "shards").iterdir())
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    second = run(base, tmp_path / "second", more)
    faults = [row.get("teacher_cache/damaged") for row in second.metrics]
    assert sum(count or 0 for count in faults) == len(paths)
    assert all(rate is not None and 0 < rate < 1 for rate in rates(second))
    assert [row["loss"] for row in second.metrics] == pytest.approx([row["loss"] for row in first.metrics], rel=1e-5)


def offline(base: dict[str, Any], folder: Path, **method: Any) -> dict[str, Any]:
    """Settings of a run on the data's completions, with a teacher of its own folder."""
    shutil.copytree(base["teacher"], folder / "teacher")
    more = {"teacher": str(folder / "teacher"), "cache": {"dir": str(folder / "cache")}, "steps": 6}
    chosen = {"name": "gkd", "on_policy_fraction": 0.0, **method}
    return configuration.merge(base, {**more, "method": chosen, "eval": {"problems": 4, "samples": 2}})


ONLY = {"cache": {"only": True}}


@pytest.mark.parametrize("name", ["gkd", "temperature"])
def test_a_run_whose_scores_are_stored_needs_no_teacher(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    settings = offline(base, tmp_path, name=name)
    plain = run(settings, tmp_path / "plain", {"cache": {"dir": None}})
    found = score(configuration.resolve(settings))
    assert (found["completions"], found["scored"], found["stored_before"]) == (30, 30, 0)
    assert score(configuration.resolve(settings))["stored_before"] == 30
    shutil.rmtree(tmp_path / "teacher")
    alone = run(settings, tmp_path / "alone", ONLY)
    assert rates(alone) == [1.0] * 6
    losses = [[row["loss"] for row in own.metrics] for own in (plain, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert any("is not loaded: its scores come from the cache" in note for note in alone.prepared.notes)
    assert "reverse_kl" not in json.dumps(alone.results)
    assert same(runner.load(tmp_path / "alone"), alone)


def test_a_teacher_with_another_tokenizer_need_not_be_there(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"the quick {n}", "response": f" fox {n}", "answer": "x"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model_of(tmp_path / "other", "byte-level", seed=2, width=24)
    pair = {
        "student": str(make_model_of(tmp_path / "student", "gemma", seed=1, scale=0.1)),
        "teacher": str(tmp_path / "other"),
        "data": str(tmp_path / "data.jsonl"),
        "method": {"name": "gold", "on_policy_fraction": 0.0},
        "cache": {"dir": str(tmp_path / "cache")},
        "rollout": {"prompts": 4, "max_new_tokens": 12},
    }
    settings = configuration.merge({**base, "eval": {"problems": 0}}, pair)
    plain = run(settings, tmp_path / "plain", {"cache": {"dir": None}})
    score(configuration.resolve(settings))
    shutil.rmtree(tmp_path / "other")
    alone = run(settings, tmp_path / "alone", ONLY)
    losses = [[row["loss"] for row in own.metrics] for own in (plain, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert rates(alone) == [1.0] * 3


def test_what_is_not_stored_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    settings = offline(base, tmp_path)
    with pytest.raises(UserError, match="holds no scores of the teacher .*; `retort score DATA --teacher .* --cache"):
        prepare(configuration.resolve(settings, ONLY))
    assert not (tmp_path / "cache").exists()
    score(configuration.resolve(settings))
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(UserError, match="no such folder.* cache.only=true runs from them alone") as caught:
        prepare(configuration.resolve(settings))
    assert "\n" not in str(caught.value)
    shorter = {"rollout": {"max_new_tokens": 1}}  # it cuts the completions
    with pytest.raises(UserError, match="is not loaded .* the cache does not hold: .*; store it with `retort score`"):
        run(settings, tmp_path / "need", shorter, ONLY)
    assert not (tmp_path / "need").exists(), "it is refused before it begins"
    on_policy = {**settings, "method": {"name": "opd"}}
    with pytest.raises(UserError, match="is not loaded .*its scores of .* are not in the cache; `retort score"):
        run(on_policy, tmp_path / "need", ONLY)
    with pytest.raises(UserError, match="completions of method 'cold_start_sft' are a teacher's"):
        prepare(configuration.resolve(settings, ONLY, {"cold_start": {"steps": 1}}))
    checked = examine(configuration.resolve(settings, ONLY, {"checks": "warn"}))
    assert checked.verdict != "fatal"
    with pytest.raises(UserError, match="only=true takes scores from a cache"):
        configuration.resolve({"cache": {"only": True}})


def test_what_is_scored_is_given_completions(base: dict[str, Any], tmp_path: Path) -> None:
    settings = offline(base, tmp_path)
    with pytest.raises(UserError, match="name its folder: --cache DIR"):
        score(configuration.resolve(settings, {"cache": {"dir": None}}))
    with pytest.raises(UserError, match="learns from no completion of the data"):
        score(configuration.resolve(configuration.merge(base, {"cache": {"dir": str(tmp_path / "c")}})))
    with pytest.raises(UserError, match=r"cache.only=true loads no teacher, and retort score has one score"):
        score(configuration.resolve(settings, ONLY))
    assert not (tmp_path / "cache").exists()


def test_the_commands(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = offline(base, tmp_path)
    cache = str(tmp_path / "cache")
    names = ["--student", base["student"], "--teacher", settings["teacher"], "--method", "gkd", "--cache", cache]
    words = ["method.on_policy_fraction=0", "device=cpu", "precision=fp32", "eval.problems=0", "steps=2", "checks=skip"]
    words += ["rollout.max_new_tokens=6", "rollout.prompts=4", "task=exact", "cold_start.steps=0"]
    assert main(["score", base["data"], *names, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completions"], found["scored"], found["cache"]) == (30, 30, cache)
    assert main(["score", base["data"], *names, *words]) == 0
    assert "30 completions: 0 scores computed, 30 were in the cache" in capsys.readouterr().out
    shutil.rmtree(settings["teacher"])
    train = ["train", "--data", base["data"], *names, *words, "--out", str(tmp_path / "run"), "cache.only=true"]
    assert main(train) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line[RATE] for line in lines] == [1.0, 1.0]
    assert main(["score", base["data"], *names[:4], *words]) == 2


def test_a_doctor_writes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    examine(configuration.resolve(base, {"checks": "warn", "cache": {"dir": str(tmp_path / "cache")}}))
    assert not (tmp_path / "cache").exists()


def test_the_weights_of_a_stored_teacher_are_never_read(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is there, and takes no memory all the same."""
    settings = offline(base, tmp_path)
    score(configuration.resolve(settings))
    read: list[str] = []

    def noted(name: str, *given: Any, **more: Any) -> Any:
        read.append(name)
        return read_model(name, *given, **more)

    monkeypatch.setattr("retort.models.load.read_model", noted)
    found = prepare(configuration.resolve(settings, ONLY))
    assert read == [settings["student"]]
    layers = found.teachers.lms["teacher"].model.base_model.parameters()
    assert all(weight.is_meta for weight in layers)
