"""Scores of prompts with images in a cache: found again by the images' digests, and used without the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import make_image_model
from PIL import Image

from retort import config as configuration
from retort.cli.score import score
from retort.errors import UserError
from retort.train import runner

RATE = "teacher_cache/hit_rate"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, and data with responses: one prompt, and another image in each row."""
    made = tmp_path_factory.mktemp("images")
    make_image_model(made / "student", "llava", seed=1)
    make_image_model(made / "teacher", "llava", seed=2)
    write_data(made / "data.jsonl", first=0)
    return made


def write_data(path: Path, *, first: int) -> None:
    rows = list[str]()
    for seed in range(first, first + 5):
        pixels = torch.randint(0, 255, (24, 24, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(path.parent / f"{seed}.png")
        rows.append(json.dumps({"prompt": "what ?", "images": [f"{seed}.png"], "answer": "a", "response": "a b"}))
    path.write_text("\n".join(rows))


def settings_of(home: Path, method: dict[str, Any], **more: Any) -> Any:
    settings = {
        "student": str(home / "student"),
        "teacher": str(home / "teacher"),
        "data": str(home / "data.jsonl"),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 1,
        "method": method,
        "rollout": {"prompts": 3, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-2},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
    }
    return configuration.resolve(settings, more)


def run(config: Any, folder: Path) -> tuple[bytes, list[float | None]]:
    """The weights that a run learns, and the share of scores that it found in its cache."""
    found = runner.start(config, folder).go()
    return (folder / "model" / "model.safetensors").read_bytes(), [row.get(RATE) for row in found.metrics]


@pytest.mark.parametrize("method", ["opd", "gkd"], ids=["numbers", "hidden states"])
def test_a_run_with_a_cache_is_the_run_without_it(method: str, home: Path, tmp_path: Path) -> None:
    cache = {"cache": {"dir": str(tmp_path / "cache")}}
    plain, _ = run(settings_of(home, {"name": method}), tmp_path / "plain")
    first, _ = run(settings_of(home, {"name": method}, **cache), tmp_path / "first")
    second, rates = run(settings_of(home, {"name": method}, **cache), tmp_path / "second")
    assert plain == first == second
    assert rates == [1.0]


def test_a_run_from_stored_scores_needs_no_teacher_and_finds_those_of_its_own_images_only(
    home: Path, tmp_path: Path
) -> None:
    method = {"name": "gkd", "on_policy_fraction": 0.0}
    cache = {"dir": str(tmp_path / "cache")}
    plain, _ = run(settings_of(home, method), tmp_path / "plain")
    assert score(settings_of(home, method, cache=cache))["stored_before"] == 0
    weights = home / "teacher" / "model.safetensors"
    weights.rename(home / "away")
    try:
        only = {"cache": {**cache, "only": True}}
        assert run(settings_of(home, method, **only), tmp_path / "only") == (plain, [1.0])
        write_data(home / "others.jsonl", first=50)
        others = settings_of(home, method, data=str(home / "others.jsonl"), **only)
        with pytest.raises(UserError, match="of 5 of 5 rows .* the cache does not hold") as refused:
            run(others, tmp_path / "others")
        assert "\n" not in str(refused.value)
    finally:
        (home / "away").rename(weights)
