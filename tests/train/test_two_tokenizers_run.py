"""Whole runs of a student and a teacher with two tokenizers: they learn, are recorded, and resume bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train.storage.test_survival import changed, go, lines, weights
from trained import make_model_of

from retort import Stop
from retort import config as configuration
from retort.align.tokens import OtherTokenizer
from retort.errors import UserError
from retort.preflight.doctor import examine
from retort.train import runner
from retort.train.models import loading
from retort.train.setup.prepare import prepare

PROMPTS = ["the quick brown fox", "hello world", "a b c d e", "def f(x):"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": prompt, "response": " the fox", "answer": "fox"} for prompt in PROMPTS * 3]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": str(make_model_of(folder / "student", "gemma", seed=1, scale=0.1)),
        "teacher": str(make_model_of(folder / "teacher", "byte-level", seed=2, width=24)),
        "data": str(folder / "data.jsonl"),
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "rollout": {"prompts": 4, "max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant"},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
    }


@pytest.mark.parametrize(("name", "metric"), [("strict_ct", "loss"), ("simct", "loss"), ("opd", None), ("exopd", None)])
def test_a_run_lowers_what_it_is_to_lower(
    settings: dict[str, Any], tmp_path: Path, name: str, metric: str | None
) -> None:
    """`exopd` adds a base model, the student's own beginning, read in the teacher's units; sampled values are noisy."""
    own = changed(settings, method={"name": name}, steps=14 if metric else 3)
    go(own, tmp_path / "run")
    rows = lines(tmp_path / "run")
    for row in rows:
        shares = [row[f"view/teacher/{part}"] for part in ("one_to_one", "spans", "unread")]
        assert sum(shares) == pytest.approx(1.0)
        assert shares[0] > 0
        assert row["grad_norm"] > 0
    if metric:
        before, after = (sum(row[metric] for row in part) / 4 for part in (rows[:4], rows[-4:]))
        assert after < before, (before, after)


class Stopping:
    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> Stop | None:
        return Stop("enough") if run.step == 2 else None


@pytest.mark.parametrize("name", ["strict_ct", "opd"])
def test_a_run_with_a_cold_start_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The first step learns from answers of the teacher's, in the student's tokens, up to bytes that are no text."""
    more = {
        "cold_start": {"steps": 1, "attempts": None},
        "rollout": {"max_new_tokens": 60},
        "optimizer": {"updates": 2},
    }
    own = changed(settings, method={"name": name}, steps=4, checkpoint={"every": 1}, **more)
    go(own, tmp_path / "whole")
    stopped = runner.start(configuration.resolve(own), tmp_path / "stopped")
    stopped.callbacks = (Stopping(),)
    stopped.go()
    runner.resume(tmp_path / "stopped").go()
    assert lines(tmp_path / "whole") == lines(tmp_path / "stopped")
    ours, theirs = (weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert lines(tmp_path / "whole")[0]["view/teacher/unread"] == 0, "the teacher reads all that it generated"


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ({"name": "gkd"}, "method 'gkd' needs .* of the teacher, but"),
        ({"name": "eopd"}, "method 'eopd' needs .* of the teacher, but"),
    ],
)
def test_methods_that_compare_ids_are_refused_before_any_run_loads_a_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], needs: str
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=needs) as refused:
        prepare(configuration.resolve(changed(settings, method=method)))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("or a method for two tokenizers, such as strict_ct, simct or opd")
    assert not isinstance(refused.value, OtherTokenizer)


def test_the_doctor_says_what_both_have_in_common(settings: dict[str, Any]) -> None:
    own = changed(settings, method={"name": "strict_ct"})
    found = examine(configuration.resolve(own))
    assert found["tokenizer"].verdict == "ok"
    assert "method 'strict_ct' compares units of the same bytes" in found["tokenizer"].saw
    assert "bytes of the data's answers" in found["units"].saw
    values = dict(found["units"].values)
    assert values["one_to_one"] + values["spans"] + values["unread"] == pytest.approx(1.0)
    assert values["shared"] > 100
    assert found["stop token"].verdict == found["chat template"].verdict == "ok"
    assert "nats a token" in found["teacher is loaded"].saw
    assert found["teacher repeats"].verdict == "ok"
    refused = examine(configuration.resolve(changed(settings, method={"name": "gkd"})))
    assert refused["tokenizer"].verdict == "fatal"
    assert "method 'gkd' needs" in refused["tokenizer"].saw
    assert "strict_ct, simct or opd" in refused["tokenizer"].remedy
