"""A step of every method that reads a teacher, with the teacher on a server: to the last bit that of the local run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from served import in_thread

from retort import config as configuration
from retort import registry
from retort.models import branches
from retort.models.load import load_model
from retort.train import runner
from retort.train.setup.pair import teacher_use

#: Methods that read a teacher other than the student's own weights.
NAMES = [name for name in registry.for_tokens() if teacher_use(registry.load(name)) is not None]


@pytest.fixture(scope="module")
def url(model_folder: Callable[..., Path]) -> Iterator[str]:
    folder = model_folder(seed=2, hidden_size=24, padded_to=64)  # that of `tiny_run`
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as found:
        yield found


def weights(settings: dict[str, Any], folder: Path) -> bytes:
    runner.start(configuration.resolve(settings), folder).go()
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("images_as_text")
@pytest.mark.parametrize("name", NAMES)
@pipeline.models_once()
def test_a_step_is_the_local_one_to_the_last_bit(
    name: str, tiny_run: dict[str, Any], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server reads each branch of a look ahead by itself, which is the definition. A model of this process may read
    # all of them in one row, equal to rounding (tests/models/test_branches.py); here both do what is defined.
    monkeypatch.setattr(branches, "WORTH", math.inf)
    settings = tiny_run | {"method": {"name": name}, "steps": 1, "eval": {"problems": 0}, "checks": "skip"}
    settings = pipeline.for_method(settings, registry.load(name))  # further teachers where it asks for them
    more = settings.get("models", {})
    everybody: dict[str, Any] = {"teacher": url}
    if more:
        everybody["models"] = {own: {"path": url} for own in more}
        settings["models"] = {own: {"path": settings["teacher"]} for own in more}
    local, served = weights(settings, tmp_path / "local"), weights(settings | everybody, tmp_path / "served")
    assert served == local
    learnt = load_model(str(tmp_path / "local" / "model"), role="student", precision="fp32", device=torch.device("cpu"))
    before = load_model(tiny_run["student"], role="student", precision="fp32", device=torch.device("cpu"))
    assert learnt.whole_digest() != before.whole_digest(), "the step has moved the student"
