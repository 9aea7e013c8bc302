"""Methods in runs whose student decides denoising steps: which of them learn, and why others do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flowing import planes, settings
from torch import Tensor

from retort import config as configuration
from retort.errors import UserError
from retort.train import runner

ON_POLICY = {"on_policy_fraction": 1.0, "temperature": 1.0}
RUN: list[tuple[str, dict[str, Any]]] = [
    ("flow_opd", {}),
    ("flow_opd", {"gradient": "sampled_log_ratio"}),
    ("flow_opd", {"gradient": "paper_detached"}),
    ("diffusion_opd", {}),
    ("opd", {}),
    ("gkd", {"divergence": "reverse_kl", **ON_POLICY}),
    ("gkd", {"divergence": "forward_kl", **ON_POLICY}),
    ("vopd", {"top_k": None}),
    ("exopd", {}),
    ("gopd", {"reward_weight": 0.5}),
    ("sod", {}),
    ("sod", {"coef": 0.0}),
    ("atod", {}),
    ("uni_opd", {}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gkd", {"divergence": "jsd", **ON_POLICY}, "of two Gaussians, only the forward and the reverse KL have a closed"),
    ("gkd", {"divergence": "reverse_kl", "temperature": 1.0}, "also learns from what the student did not sample now"),
    ("opd", {"temperature": 0.7}, "a temperature of 0.7, which divides logits"),
    ("vopd", {}, "log-probs of the student's top-20 from a teacher"),
    ("eopd", {}, "entropy .that of a step is its noise's, whatever a model says. and its top-16"),
    ("power_opd", {}, "the probability of what was decided .a latent has a density."),
    ("va_opd", {}, "a flow model reads the student's own prompt and no other one"),
    ("rlsd", {}, "'rlsd' asks no teacher"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("flows")
    planes(found)
    return found


def right(samples: Tensor, prompts: Any) -> list[float]:
    """A reward: how far to the right a point is."""
    return samples[:, 0].sigmoid().tolist()


def given(folder: Path, name: str, method: dict[str, Any]) -> dict[str, Any]:
    made = {"name": name, "samples": 2, **method}
    return settings(folder, method=made, steps=2, flow={"rewards": [f"{__name__}:right"]}, checkpoint={"every": 0})


def named(name: str, method: dict[str, Any], *_: Any) -> str:
    return "-".join([name, *(f"{key}={value}" for key, value in method.items())])


@pytest.mark.parametrize(("name", "method"), RUN, ids=[named(*one) for one in RUN])
def test_these_learn(folder: Path, tmp_path: Path, name: str, method: dict[str, Any]) -> None:
    run = runner.start(configuration.resolve(given(folder, name, method)), tmp_path / "run")
    before = run.student.digest()
    run.go()
    assert len(run.metrics) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in run.metrics)
    assert run.student.digest() != before


@pytest.mark.parametrize(("name", "method", "why"), REFUSED, ids=[named(*one) for one in REFUSED])
def test_these_are_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, name: str, method: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why) as raised:
        runner.start(configuration.resolve(given(folder, name, method)), tmp_path / "run")
    assert "\n" not in str(raised.value)
