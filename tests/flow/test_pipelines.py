"""Pipelines of diffusers with random weights: opened, sampled, taught, saved, and opened again by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_models
import pytest
import torch
from torch import Tensor

from retort.core.trajectory import Noise
from retort.errors import UserError
from retort.flows.load import is_flow, open_flow
from retort.flows.lora import add_lora, save_adapter
from retort.flows.merging import merged_start
from retort.flows.model import FlowModel
from retort.flows.pipeline import PipelineFlow
from retort.flows.sampling import FlowRequest, FlowSampling, denoise, samples
from retort.flows.steps import DecidedSteps
from retort.functional import flow_losses

pytestmark = pytest.mark.flow
TEXTS = ("a red letter b", "the blue picture")
KINDS: dict[str, Callable[[], Any]] = {
    "sd3": flow_models.sd3,
    "sd3-dynamic": lambda: flow_models.sd3(use_dynamic_shifting=True),
    "flux": flow_models.flux,
    "flux-schnell": lambda: flow_models.flux(guidance_embeds=False, use_dynamic_shifting=False),
}
each = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("kind", ["sd3", "flux"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = flow_models.made(KINDS[kind](), tmp_path_factory.mktemp("pipeline") / kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def opened(folder: Callable[[str], Path]) -> Callable[[str], PipelineFlow]:
    """Opened once; whoever changes one opens its own."""
    made: dict[str, PipelineFlow] = {}

    def make(kind: str) -> PipelineFlow:
        if kind not in made:
            made[kind] = fresh(folder(kind))
        return made[kind]

    return make


def fresh(path: Path, role: str = "student") -> PipelineFlow:
    found = open_flow(path, role=role, height=32, width=24)
    assert isinstance(found, PipelineFlow)
    return found


def requests(count: int = 2) -> list[FlowRequest]:
    keys: list[Any] = [(0, "rollouts", text) for text in TEXTS[:count]]
    return [FlowRequest(text, key, key) for text, key in zip(TEXTS, keys, strict=False)]


def predicted(flow: PipelineFlow, seed: int = 0) -> Tensor:
    """In fp32, as the weights are."""
    latents = torch.randn(2, *flow.latent_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return flow.velocity(latents, torch.tensor([0.9, 0.3]), flow.condition(TEXTS))


@each
def test_what_it_is(kind: str, folder: Callable[[str], Path], opened: Callable[[str], PipelineFlow]) -> None:
    flow = opened(kind)
    assert is_flow(folder(kind)) and flow.latent_shape == (4, 8, 6)
    assert all(own.requires_grad for own in flow.module.parameters())
    frozen = [part for part in flow.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    own = {id(weight) for weight in flow.module.parameters()}
    assert not any(weight.requires_grad for part in frozen for weight in part.parameters() if id(weight) not in own)
    assert type(flow.module).__name__ in flow.identity["architecture"] and "4 x 8 x 6" in flow.identity["architecture"]
    assert "FlowMatchEulerDiscreteScheduler" in flow.identity["schedule"] and "shift 3.0" in flow.identity["schedule"]
    assert not any("\n" in words for words in flow.identity.values())


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@each
def test_without_noise_it_makes_the_pipelines_own_picture(
    kind: str, guidance: float, opened: Callable[[str], PipelineFlow]
) -> None:
    """Noise levels, conditioning, guidance, packing and decoding are those of the pipeline's own call."""
    flow = opened(kind)
    model, pipeline = FlowModel(flow, kind, guidance=guidance), flow.pipeline
    ours = flow.decoded(samples(model, requests(), steps=5, batch=1))
    first = torch.stack([denoise(model, [one], sampling(steps=2))[0].latents[0] for one in requests()])
    if kind.startswith("flux"):
        first = pipeline._pack_latents(first, 2, *flow.latent_shape)
        guided = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]}
    else:
        guided = {"guidance_scale": guidance}
    theirs = pipeline(
        prompt=list(TEXTS), height=32, width=24, num_inference_steps=5, latents=first, output_type="pt", **guided
    ).images
    assert ours.shape == (2, 3, 32, 24) and float(ours.min()) >= 0 and float(ours.max()) <= 1
    assert float(ours.std()) > 0.05  # pictures of one colour would hide everything
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert torch.equal(flow.sigmas(5), pipeline.scheduler.sigmas.double())


def test_the_shift_follows_the_size_of_the_pictures(folder: Callable[[str], Path]) -> None:
    levels = [open_flow(folder("flux"), role="teacher", height=side, width=side).sigmas(4) for side in (16, 32, 64)]
    assert levels[0][1] < levels[1][1] < levels[2][1]
    assert all(one[0] == 1.0 and one[-1] == 0.0 for one in levels)


def test_the_guidance_embedding_reads_the_pipelines_default(opened: Callable[[str], PipelineFlow]) -> None:
    asked = opened("flux").condition(TEXTS)
    assert asked.tensors["guidance"].tolist() == [3.5, 3.5]
    assert "guidance" not in opened("flux-schnell").condition(TEXTS).tensors


def test_drawing_and_asking_leave_the_global_stream_alone(opened: Callable[[str], PipelineFlow]) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    opened("sd3").condition(["a green letter"])
    opened("sd3").sigmas(7)
    assert torch.equal(torch.rand(3), wanted)


def sampling(steps: int = 4) -> FlowSampling:
    return FlowSampling(Noise("sde", 0.7), steps=steps, window=None, window_end=None, batch=2)


@both
def test_it_learns_a_step_and_diffusers_opens_the_result(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    flow, teacher = fresh(folder(kind)), FlowModel(fresh(folder(kind), "teacher"), "teacher", frozen=True)
    with torch.no_grad():
        for weight in teacher.of.module.parameters():
            weight.mul_(1.05)
    adapter = add_lora(flow.module, rank=2, alpha=4.0, name=str(folder(kind)))
    before = predicted(flow)
    student = FlowModel(flow, "student")
    trajectories = denoise(student, requests(), sampling())
    steps = DecidedSteps.of(trajectories, TEXTS)
    optimizer = torch.optim.AdamW(list(student.trainable().values()), lr=1e-2)
    losses = list[float]()
    for _ in range(6):
        found = flow_losses(
            "flow_opd",
            student_velocity=student.velocity(steps.latents, steps.sigmas_N, steps.texts),
            teacher_velocity=teacher.velocity(steps.latents, steps.sigmas_N, steps.texts),
            latents=steps.latents,
            next_latents=steps.next_latents,
            sigmas=steps.sigmas_N,
            next_sigmas=steps.next_sigmas_N,
            noise_level=steps.noise.level,
            sigma_max=steps.noise.sigma_max,
        )
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(float(found.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    learnt = predicted(flow)
    assert not torch.allclose(learnt, before, atol=1e-3)

    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").mkdir()
    flow.save(tmp_path / "model")
    save_adapter(adapter, tmp_path / "adapter")
    whole = DiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    torch.testing.assert_close(predicted(PipelineFlow(whole, height=32, width=24)), learnt, rtol=1e-4, atol=1e-5)
    over = DiffusionPipeline.from_pretrained(folder(kind), use_safetensors=True)
    over.load_lora_weights(str(tmp_path / "adapter"))
    torch.testing.assert_close(predicted(PipelineFlow(over, height=32, width=24)), learnt, rtol=1e-4, atol=1e-5)
    by_us = fresh(tmp_path / "adapter", "teacher")
    torch.testing.assert_close(predicted(by_us), learnt, rtol=1e-4, atol=1e-5)
    assert unchanged(folder(kind), tmp_path / "model")


def unchanged(before: Path, after: Path) -> bool:
    """Whether all files but the transformer's are the same, byte for byte, and none is left out or added."""
    names = [
        {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        for folder in (before, after)
    ]
    others = [name for name in names[0] if not name.startswith("transformer/") and name != "model_index.json"]
    return names[0] == names[1] and all((before / name).read_bytes() == (after / name).read_bytes() for name in others)


def test_a_pipeline_in_memory_is_saved_whole(tmp_path: Path) -> None:
    flow = PipelineFlow(flow_models.sd3(), height=32, width=24)
    flow.save(tmp_path)
    torch.testing.assert_close(predicted(fresh(tmp_path)), predicted(flow), rtol=1e-5, atol=1e-6)


def test_without_its_third_text_encoder_it_is_opened_and_saved_alike(tmp_path: Path) -> None:
    """Stable Diffusion 3 is often used without T5, which is as large as all else."""
    pipeline = flow_models.sd3()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    flow = fresh(flow_models.made(pipeline, tmp_path / "before"))
    (tmp_path / "after").mkdir()
    flow.save(tmp_path / "after")
    assert torch.equal(predicted(fresh(tmp_path / "after")), predicted(flow))


def test_a_copy_shares_what_is_frozen(opened: Callable[[str], PipelineFlow]) -> None:
    import copy

    flow = opened("sd3")
    other = copy.deepcopy(flow)
    assert other.pipeline.text_encoder is flow.pipeline.text_encoder and other.module is not flow.module
    assert other.pipeline.transformer is other.module
    assert torch.equal(predicted(other), predicted(flow))


@pytest.mark.parametrize("products", [False, True])
def test_two_adapters_are_merged_into_the_student(
    products: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The mean of the factors is a student's adapter; the mean of the products is in its weights."""
    experts = list[Path]()
    for seed in (1, 2):
        flow = fresh(folder("sd3"))
        adapter = flow_models.tuned(add_lora(flow.module, rank=2, alpha=4.0, name=str(folder("sd3"))), seed=seed)
        experts.append(tmp_path / str(seed))
        experts[-1].mkdir()
        save_adapter(adapter, experts[-1])
    student = fresh(folder("sd3"))
    before = predicted(student)
    own = add_lora(student.module, rank=2, alpha=4.0)
    merged_start(student, experts, products=products)
    after = predicted(student)
    assert not torch.allclose(after, before, atol=1e-3)
    with own.off():
        assert torch.equal(predicted(student), before) is not products
    teacher = open_flow(experts[0], role="teacher", base=fresh(folder("sd3")))
    assert isinstance(teacher, PipelineFlow) and not torch.allclose(predicted(teacher), before, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((30, 32), "images of 30 x 32: the pipeline refuses them: .*divisible"),
        ((32, 128), "images of 32 x 128: the .*12"),
    ],
)
def test_a_size_that_it_cannot_make_is_refused(
    size: tuple[int, int], words: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        open_flow(folder("sd3"), role="student", height=size[0], width=size[1])
    assert "\n" not in str(refused.value)


def test_flux_rounds_sizes_which_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="makes images of 32 x 24 pixels instead of 36 x 24; set flow.height"):
        open_flow(folder("flux"), role="student", height=36, width=24)
