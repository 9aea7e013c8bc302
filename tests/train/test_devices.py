"""Runs on a pretended GPU: nothing of them is on the wrong side, and their numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import Misplaced, pretended

from retort import config as configuration
from retort.train import runner, setup


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch) as gpu:
        here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
        assert (there.device.type, here.device.type, (there + 1)[1:].device.type) == ("cuda", "cpu", "cuda")
        assert there.new_zeros(2).device.type == torch.zeros_like(there).device.type == "cuda"
        assert there.cpu().device.type == here.to(there).cpu().device.type == "cpu"
        for wrong in (
            lambda: here + there,
            lambda: there @ here,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
            lambda: there.numpy(),
        ):
            with pytest.raises(Misplaced):
                wrong()
        waits = gpu.waits.total()
        assert float((there * torch.tensor(2.0))[torch.tensor([1])].sum()) == 2.0
        assert gpu.waits.total() == waits + 1
        weight = torch.nn.Parameter(there)
        weight.square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.device.type == "cuda"


@pytest.mark.parametrize(
    "method",
    [{"name": "opd"}],
    ids=lambda m: m["name"],
)
def test_a_run_on_a_pretended_gpu_is_the_run_on_the_cpu(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    sections = {"method": method, "steps": 2, "eval": {"problems": 2}}
    config = configuration.resolve(configuration.merge(tiny_run, sections))
    here = runner.start(config, tmp_path / "cpu").go()
    with pretended(monkeypatch) as gpu:
        monkeypatch.setattr(setup, "device_of", lambda config: "cuda")
        run = runner.start(config, tmp_path / "gpu")
        assert run.setup.student.device.type == run.setup.teacher_lm.device.type == "cuda"
        run.go()
    print(gpu.waits)
    assert here.results == run.results
