"""The runs of `test_vllm.py` against `retort serve`, started as a user starts it: the local runs to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines.ours import serving

from retort import config as configuration
from retort.tasks import countdown
from retort.train import runner

pytestmark = pytest.mark.engines

SETTINGS: dict[str, Any] = {
    "student": "countdown:student",
    "data": "countdown",
    "steps": 2,
    "precision": "fp32",
    "device": "cpu",
    "rollout": {"prompts": 8, "max_new_tokens": 12},
    "optimizer": {"learning_rate": 1e-4},
    "eval": {"problems": 0},
}
#: What of the metrics is a matter of time.
TIMES = ("time/", "tokens_per_second")
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "eopd": {},
    "gkd": {"on_policy_fraction": 1.0},
    "vopd": {},
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("countdown:teacher", "precision=fp32", "device=cpu") as found:
        yield found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_that_with_the_teacher_in_its_process(url: str, tmp_path: Path, method: str) -> None:
    given = SETTINGS | {"method": {"name": method, **METHODS[method]}}
    far, near = (
        runner.start(configuration.resolve(given, {"teacher": teacher}), tmp_path / str(place)).go()
        for place, teacher in enumerate((url, "countdown:teacher"))
    )
    learnt, also = ((run.folder / "model" / "model.safetensors").read_bytes() for run in (far, near))
    assert learnt == also
    assert learnt != (countdown.student_path() / "model.safetensors").read_bytes(), "the student has moved"
    timeless = [
        [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in run.metrics]
        for run in (far, near)
    ]
    assert timeless[0] == timeless[1]
