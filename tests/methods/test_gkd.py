"""GKD: the divergences it offers, by hand, and the mixture it learns from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from retort import config as configuration
from retort.errors import UserError
from retort.functional import token_losses
from retort.registry import load
from retort.train import runner

P = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()


def loss(**settings: Any) -> float:
    method = load("gkd", **settings)
    return token_losses(method, student_logits=Q, teacher_logits=P, tokens=torch.tensor([0])).loss.item()


def test_the_three_divergences() -> None:
    assert loss(divergence="forward_kl") == pytest.approx(0.24437, abs=5e-6)
    assert loss(divergence="reverse_kl") == pytest.approx(0.21256, abs=5e-6)
    mixture = ((P.exp() + Q.exp()) / 2).log()
    by_hand = ((P.exp() * (P - mixture)).sum() + (Q.exp() * (Q - mixture)).sum()).item() / 2
    assert loss() == pytest.approx(by_hand, abs=1e-12)
    assert loss() < math.log(2)


def test_the_ends_of_the_weight_are_refused_but_only_for_jsd() -> None:
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        load("gkd", teacher_weight=1.0)
    load("gkd", divergence="forward_kl", teacher_weight=1.0)


def test_the_loss_is_at_temperature_one_whatever_the_sampling() -> None:
    assert loss(temperature=0.3) == loss(temperature=2.0)
    assert load("gkd").rollout.temperature == 0.9


@pytest.mark.parametrize(
    ("fraction", "sources"), [(0.0, {"dataset"}), (1.0, {"student"}), (0.5, {"dataset", "student"})]
)
def test_the_mixture(tiny_run: dict[str, Any], tmp_path: Path, fraction: float, sources: set[str]) -> None:
    sections = {
        "method": {"name": "gkd", "on_policy_fraction": fraction},
        "record": {"rollouts": 8},
        "rollout": {"prompts": 8},
        "eval": {"problems": 0},
    }
    runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "run").go()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == sources
    for row in rows:
        if row["source"] == "dataset":
            assert row["tokens"][-1] == "<eos>"  # an answer that is never closed would teach the student not to stop
            assert row["reward"] is None
