"""Runs on a pretended GPU: nothing of them is on the wrong side, and their numbers are those of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import Misplaced, Pretended, pretended

from retort import config as configuration
from retort.core import distribution
from retort.preflight import checks, trial
from retort.train import runner
from retort.train.learning import update
from retort.train.models import models


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


def counted(monkeypatch: pytest.MonkeyPatch, gpu: Pretended) -> list[int]:
    """How often each micro-batch waits for the GPU, from now on."""
    found: list[int] = []
    backward = update._backward

    def watched(*arguments: Any) -> Any:
        before = gpu.waits.total()
        made = backward(*arguments)
        found.append(gpu.waits.total() - before)
        return made

    monkeypatch.setattr(update, "_backward", watched)
    return found


@pytest.mark.parametrize("method", ["opd", "sdpo"])
def test_a_run_on_a_pretended_gpu_is_the_run_on_the_cpu(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One with a teacher whose signal has no top-k, one that teaches itself and sees nothing before some answers."""
    sections: dict[str, Any] = {"method": {"name": method}, "steps": 1, "eval": {"problems": 2, "samples": 1}}
    if method == "sdpo":
        tiny_run["teacher"] = None
    config = configuration.resolve(configuration.merge(tiny_run, sections))
    monkeypatch.setattr(distribution, "KERNELS", False)  # a kernel needs a real one
    here = runner.start(config, tmp_path / "cpu").go()
    with pretended(monkeypatch) as gpu:
        monkeypatch.setattr(models, "device_for", lambda config: "cuda")
        monkeypatch.setattr(checks, "available", lambda device: None)
        run = runner.start(config, tmp_path / "gpu")
        assert run.student.device.type == run.student.head().weight_VD.device.type == "cuda"
        waits = counted(monkeypatch, gpu)
        run.go()
        assert [check.name for check in (*checks.quick_checks(run.prepared), *trial.trial_checks(run.prepared))]
    # Checks of what teachers said; the loss and what is recorded are read once, after all micro-batches.
    assert len(waits) > 1
    assert max(waits) <= {"opd": 12, "sdpo": 6}[method]
    assert here.results == run.results
    lines = [json.loads((tmp_path / side / "metrics.jsonl").read_text()) for side in ("cpu", "gpu")]
    for name in lines[0]:
        assert name.startswith(("time/", "tokens_per")) or lines[0][name] == lines[1][name], name
