"""Several teachers with a cache: the scores of each are stored, and what they say together follows from these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.cli.score import score
from retort.errors import UserError
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")

NAMES, RATE = ["sums", "others"], "teacher_cache/hit_rate"


@pytest.fixture
def base(model_folder: Callable[..., Path], prompts_file: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    own = [row | {"domain": NAMES[i % 2], "response": "1 + 2"} for i, row in enumerate(rows)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in own))
    folders = {"sums": model_folder(seed=2, hidden_size=24, padded_to=64), "others": model_folder(seed=3)}
    models = {name: {"path": str(shutil.copytree(folder, tmp_path / name))} for name, folder in folders.items()}
    return {
        "student": str(model_folder(seed=1)),
        "models": models,
        "teachers": {"models": NAMES},
        "data": str(data),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 2,
        "rollout": {"prompts": 4, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 64},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
        "record": {"overlap": 4, "overlap_every": 2},
    }


def run(base: dict[str, Any], out: Path, *more: dict[str, Any]) -> runner.Run:
    return runner.start(configuration.resolve(base, *more), out).go()


def weights(own: runner.Run) -> bytes:
    return (own.folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("combine", ["route", "mixture", "best"])
def test_a_run_with_a_cache_is_the_run_without_it(base: dict[str, Any], tmp_path: Path, combine: str) -> None:
    asked = {"teachers": {"combine": combine}, "method": {"name": "opd", "samples": 2}}
    cache = {"cache": {"dir": str(tmp_path / "cache")}}
    plain, first = run(base, tmp_path / "plain", asked), run(base, tmp_path / "first", asked, cache)
    second = run(base, tmp_path / "second", asked, cache)
    assert weights(plain) == weights(first) == weights(second)
    assert [row.get(RATE) for row in second.metrics] == [1.0, 1.0]
    assert RATE not in plain.metrics[0] and first.metrics[0][RATE] == 0.0


@pytest.mark.parametrize("combine", ["route", "product"])
def test_teachers_that_are_gone_teach_from_the_cache(base: dict[str, Any], tmp_path: Path, combine: str) -> None:
    asked = {
        "method": {"name": "gkd", "on_policy_fraction": 0},
        "teachers": {"combine": combine},
        "cache": {"dir": str(tmp_path / "cache")},
    }
    with_them = run(base, tmp_path / "with", asked, {"cache": {"dir": str(tmp_path / "other")}})
    assert score(configuration.resolve(base, asked))["scored"] > 0
    for name in NAMES:
        shutil.rmtree(tmp_path / name)
    without = run(base, tmp_path / "without", asked, {"cache": {"only": True}})
    assert weights(with_them) == weights(without)
    with pytest.raises(UserError, match="is not loaded .cache.only=true."):
        run(base, tmp_path / "longer", asked, {"cache": {"only": True}, "rollout": {"max_new_tokens": 3}})
