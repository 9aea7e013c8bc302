"""Folders that are no pipelines of flow matching, or hostile ones: one line each, and nothing of them is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.errors import UserError
from retort.flows.load import open_flow

pytestmark = pytest.mark.flow
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flow_models.made(flow_models.sd3(), tmp_path_factory.mktemp("pipeline") / "sd3")


def index(**changed: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        found = {**json.loads(file.read_text()), **changed}
        file.write_text(json.dumps({name: value for name, value in found.items() if value != "remove"}))

    return change


def code(folder: Path) -> None:
    """Code beside the weights, as a pipeline of its own would have it."""
    (folder / "pipeline.py").write_text("raise SystemExit('ran')\nclass Own: pass\n")
    index(_class_name=["pipeline", "Own"])(folder)


def pickled(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def changed(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return changed


def without_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(weights.items())[1:])


FOLDERS: dict[str, tuple[Change, str]] = {
    "another library": (index(vae=["os", "system"]), "only classes of diffusers and transformers are loaded"),
    "another module": (index(vae=["diffusers.utils", "x"]), "only classes of diffusers and transformers are loaded"),
    "its own code": (code, "never code that comes with a model"),
    "no class": (index(vae=["diffusers", "utils"]), "'utils', which is no such class of the installed diffusers"),
    "unknown class": (index(_class_name="NoPipeline"), "'NoPipeline', which is no such class"),
    "a class of another kind": (index(vae=["transformers", "AutoModel"]), "'AutoModel', which is no such class"),
    "not a pair": (index(vae=["diffusers"]), "it must name a library and a class"),
    "a scheduler of another kind": (
        index(scheduler=["diffusers", "DDIMScheduler"]),
        "its scheduler is DDIMScheduler, no flow-matching one that Retort knows; it must be FlowMatchEulerDiscrete",
    ),
    "no transformer": (
        index(_class_name="StableDiffusionPipeline"),
        "the denoiser of a StableDiffusionPipeline is no transformer",
    ),
    "no vae": (index(vae="remove"), "names no vae, which a StableDiffusion3Pipeline needs"),
    "no vae but in words": (index(vae=[None, None]), "names no vae"),
    "no folder of the vae": (lambda folder: shutil.rmtree(folder / "vae"), "no folder vae/"),
    "no text encoder": (index(text_encoder="remove"), "names no text_encoder"),
    "pickled": (pickled, "the weights of transformer are pickled .diffusion_pytorch_model.bin., and unpickling"),
    "no weights": (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), "no weights in vae/"),
    "no json": (lambda folder: (folder / "model_index.json").write_text("{"), "is no JSON"),
    "weights are missing": (tensors("transformer", without_one), "the weights of transformer are not .* missing"),
    "weights of an encoder are missing": (tensors("text_encoder", without_one), "weights of text_encoder .* missing"),
    "NaN": (
        tensors("vae", lambda own: {name: value * float("nan") for name, value in own.items()}),
        "weights of vae are not .* NaN or infinity",
    ),
    "a sigma that rises": (
        lambda folder: setting(folder / "scheduler" / "scheduler_config.json", invert_sigmas=True),
        "another thing than the velocity at a noise level",
    ),
    "other latents": (
        lambda folder: setting(folder / "vae" / "config.json", scaling_factor=None),
        "its VAE .AutoencoderKL. has no one factor",
    ),
}


def setting(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.mark.parametrize("kind", FOLDERS)
def test_it_is_refused_in_a_line(kind: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(whole, folder)
    change, words = FOLDERS[kind]
    change(folder)
    with pytest.raises(UserError, match=words) as refused:
        open_flow(folder, role="student", height=32, width=32)
    assert str(refused.value).startswith(f"student {folder}: ") and "\n" not in str(refused.value)


def test_no_such_folder_and_no_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_flow(tmp_path / "none", role="student")
    with pytest.raises(UserError, match="the hub is not asked, because HF_HUB_OFFLINE is set"):
        open_flow("owner/name", role="student")


def test_an_adapter_over_another_architecture_is_refused(whole: Path, tmp_path: Path) -> None:
    from retort.flows.lora import add_lora, save_adapter

    other = flow_models.flux()
    save_adapter(add_lora(other.transformer, rank=2, alpha=4.0, name=str(whole)), tmp_path)
    with pytest.raises(UserError, match="the base has no layer 'single_transformer_blocks.0.attn.to_k'|has a weight"):
        open_flow(tmp_path, role="teacher", height=32, width=32)
