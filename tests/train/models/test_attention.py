"""`attention = "auto"`: what is measured, what it prefers, and that a run keeps its choice. The clock is a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from retort import config as configuration
from retort.config import merge
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.train import runner
from retort.train.models import attention, loading


def load(folder: Path, role: str = "student") -> LanguageModel:
    return load_model(str(folder), role=role, precision="fp32", device=torch.device("cpu"))  # type: ignore[arg-type]


def ticking(*times: float) -> Callable[[], float]:
    """A clock by which each candidate takes its time, in each of the three repeats."""
    steps = [step for seconds in times for step in (1000.0, seconds, seconds, seconds)]
    marks = iter(list(accumulate(steps)))
    return lambda: next(marks)


def implementations(models: list[LanguageModel]) -> list[str]:
    return [lm.model.config._attn_implementation for lm in models]


@pytest.mark.parametrize(
    ("sdpa", "eager", "chosen"), [(1.0, 2.0, "sdpa"), (1.0, 0.95, "sdpa"), (1.0, 0.8, "eager"), (1.0, 1.0, "sdpa")]
)
def test_another_implementation_must_be_a_tenth_quicker(
    model_folder: Callable[..., Path], sdpa: float, eager: float, chosen: str
) -> None:
    models = [load(model_folder(seed=1)), load(model_folder(seed=2), role="teacher")]
    found, times = attention.quickest(models, 12, 4, clock=ticking(sdpa, eager))
    assert found == chosen
    assert list(times) == ["sdpa", "eager"]
    assert implementations(models) == [f"retort_{chosen}"] * 2
    assert all(lm.packs for lm in models)
    assert all(parameter.grad is None for parameter in models[0].model.parameters())


def test_only_what_both_models_have_is_measured(model_folder: Callable[..., Path]) -> None:
    soft_capped = model_folder(seed=3, family="gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    models = [load(model_folder(seed=1)), load(soft_capped, role="teacher")]
    found, times = attention.quickest(models, 12, 4, clock=ticking(1.0))
    assert (found, list(times)) == ("eager", ["eager"])
    assert implementations(models) == ["retort_eager"] * 2


def test_models_without_one_in_common_keep_their_own(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [load(model_folder(seed=1)), load(model_folder(seed=2), role="teacher")]
    monkeypatch.setattr(attention, "_candidates", list)
    assert attention.quickest(models, 12, 4) == (None, {})
    assert implementations(models) == ["retort_sdpa"] * 2


def test_the_choice_is_written_down_and_repeated(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []

    def quickest(models: Any, length: int, count: int) -> Any:
        measured.append((length, count))
        return attention.quickest(models, length, count, clock=ticking(1.0, 0.5))

    monkeypatch.setattr(loading, "quickest", quickest)
    run = runner.start(configuration.resolve(merge(tiny_run, {"attention": "auto", "steps": 2})), tmp_path / "run")
    assert any("attention is eager" in note and "sdpa 1,000 ms" in note for note in run.prepared.notes)
    run.go()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention"] == "eager"
    again = runner.resume(tmp_path / "run", steps=3)
    assert len(measured) == 1, "a resumed run measured again"
    assert implementations([again.student, again.teachers.lms["teacher"]]) == ["retort_eager"] * 2
    again.go()


def test_measuring_is_not_the_default(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "quickest", lambda *_: pytest.fail("measured without being asked"))
    run = runner.start(configuration.resolve(tiny_run), tmp_path / "run")
    assert run.prepared.attention is None
    assert not any("attention" in note for note in run.prepared.notes)
