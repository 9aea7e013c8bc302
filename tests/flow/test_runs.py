"""Runs on a pipeline of diffusers with two LoRA experts, up to the folder that diffusers opens."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import flow_models
import pytest
import torch
from forked import killed
from safetensors.torch import load_file

from retort import config as configuration
from retort.errors import UserError
from retort.flows.load import open_flow
from retort.flows.lora import add_lora, save_adapter
from retort.flows.pipeline import PipelineFlow
from retort.train import runner

pytestmark = pytest.mark.flow
ROWS = (
    {"id": "1", "prompt": "a red letter", "domain": "color"},
    {"id": "2", "prompt": "the letter b", "domain": "glyph"},
    {"id": "3", "prompt": "a blue picture", "domain": "color"},
    {"id": "4", "prompt": "the letter c", "domain": "glyph"},
)
EXPERTS = ("color", "glyph")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, two adapters over it, and prompts."""
    found = tmp_path_factory.mktemp("runs")
    base = flow_models.made(flow_models.sd3(), found / "sd3")
    for seed, name in enumerate(EXPERTS):
        adapter = add_lora(flow_models.sd3().transformer, rank=2, alpha=4.0, name=str(base))
        (found / name).mkdir()
        save_adapter(flow_models.tuned(adapter, seed=seed), found / name)
    (found / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return found


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "student": str(folder / "sd3"),
        "models": {name: {"path": str(folder / name)} for name in EXPERTS},
        "teachers": {"models": list(EXPERTS)},
        "data": str(folder / "data.jsonl"),
        "method": {"name": "flow_opd", "samples": 2},
        "lora": {"rank": 2},
        "device": "cpu",
        "steps": 8,
        "rollout": {"prompts": 4},
        "flow": {"steps": 4, "eval_steps": 3, "batch": 8, "height": 32, "width": 32},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 3},
        "eval": {"problems": 0},
    }
    for name, value in changed.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **value} if both else value
    return found


def velocity(flow: PipelineFlow) -> torch.Tensor:
    latents = torch.randn(2, *flow.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return flow.velocity(latents, torch.tensor([0.8, 0.4]), flow.condition(["a red letter", "the letter b"]))


@pytest.mark.parametrize("start", ["student", "merge", "merge_products"])
def test_the_kl_falls_and_diffusers_opens_what_was_learnt(start: str, folder: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    given = settings(folder, flow={"start": start, "guidance": 1.5}, steps=8 if start == "student" else 2)
    run = runner.start(configuration.resolve(given), tmp_path / "run").go()
    kl = [row["reverse_kl"] for row in run.metrics]
    assert kl[-1] < 0.8 * kl[0] if start == "student" else all(one > 0 for one in kl)
    student = run.student.of
    assert isinstance(student, PipelineFlow)
    learnt = velocity(student)
    whole = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model", use_safetensors=True)
    torch.testing.assert_close(velocity(PipelineFlow(whole, height=32, width=32)), learnt, rtol=1e-4, atol=1e-5)
    again = open_flow(tmp_path / "run" / "model", role="teacher", height=32, width=32)
    assert isinstance(again, PipelineFlow)
    torch.testing.assert_close(velocity(again), learnt, rtol=1e-4, atol=1e-5)
    if start != "merge_products":  # there, the adapter belongs to the merged weights
        over = open_flow(tmp_path / "run" / "adapter", role="teacher", height=32, width=32)
        assert isinstance(over, PipelineFlow)
        torch.testing.assert_close(velocity(over), learnt, rtol=1e-4, atol=1e-5)


def test_kill_9_and_resume_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    given = settings(folder, steps=5)
    runner.start(configuration.resolve(given), tmp_path / "whole").go()
    assert killed(given, tmp_path / "killed", 4) == -signal.SIGKILL
    runner.resume(tmp_path / "killed").go()
    name = "transformer/diffusion_pytorch_model.safetensors"
    whole, again = (load_file(tmp_path / run / "model" / name) for run in ("whole", "killed"))
    assert all(torch.equal(own, again[key]) for key, own in whole.items())


def test_a_teacher_of_another_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    other = flow_models.made(flow_models.flux(), tmp_path / "flux")
    given = settings(folder, models={"color": {"path": str(other)}})
    with pytest.raises(UserError, match="its architecture is FluxTransformer2DModel") as refused:
        runner.start(configuration.resolve(given), tmp_path / "run")
    assert "\n" not in str(refused.value)
