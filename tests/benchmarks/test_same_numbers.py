"""Two runs are the same numbers, or what differs is named."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from retort import config, registry

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("same_numbers")


def made(
    folder: Path, *, loss: float = 0.5, weight: float = 1.0, text: str = "4", avg: float = 0.25, **more: float
) -> Path:
    """The files of a run, of two steps."""
    for part in ("model", "checkpoints/step-4", "checkpoints/step-10"):
        (folder / part).mkdir(parents=True)
        save_file({"w": torch.tensor([weight, float("nan")])}, folder / part / "weights.safetensors")
    rows = [{"step": 1, "loss": 0.5, "time/step": id(folder)}, {"step": 2, "loss": loss, **more}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts.jsonl").write_text(json.dumps({"step": 1, "text": text}) + "\n")
    (folder / "eval.json").write_text(json.dumps({"rows": [{"who": "student after", "avg@2": avg}]}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": 0.5 + 2**-50}, ["metrics.jsonl, line 2: loss"]),
        ({"weight": 1 + 2**-23}, ["model: weights/w", "checkpoints/step-10: weights/w"]),
        ({"text": "5"}, ["rollouts.jsonl, line 1: text"]),
        ({"avg": 0.5}, ["eval.json, student after: avg@2"]),
        ({}, []),
    ],
)
def test_what_differs_is_named(bench: ModuleType, tmp_path: Path, change: dict[str, float], said: list[str]) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new", **change)
    assert bench.different(old, new) == (said, [])


def test_a_new_metric_is_no_difference(bench: ModuleType, tmp_path: Path) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new", fresh=1.0)
    assert bench.different(old, new) == ([], ["metrics.jsonl: fresh"])


def test_every_case_has_settings_that_exist(bench: ModuleType) -> None:
    for words in bench.CASES.values():
        pairs = [word.removeprefix("--") for word in [*bench.SMALL, *words]]
        settings = config.overrides(
            [pair.replace("method=", "method.name=") if pair.startswith("method=") else pair for pair in pairs]
        )
        resolved = config.resolve(config.recipe(settings.get("data", "countdown")), settings)
        assert resolved.method["name"] in registry.names()
        assert resolved.steps == 10
