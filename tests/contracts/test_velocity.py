"""What every velocity model must do: a later one adds a line to `MODELS`, and is made small and without a download."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import flow_models
import pytest
import torch
from torch import Tensor

from retort.flows.base import Condition, VelocityModel
from retort.flows.load import open_flow
from retort.flows.pipeline import PipelineFlow
from retort.flows.small import SmallConfig, SmallFlow

#: Prompts that every model below reads.
TEXTS = ("a ring", "a moon", "")


def small(latent_shape: tuple[int, ...]) -> SmallFlow:
    flow = SmallFlow.new(
        SmallConfig(latent_shape=latent_shape, words=("a", "ring", "moon"), width=16, layers=2, heads=2), seed=0
    )
    with torch.no_grad():  # new ones predict zeros
        for number, weights in enumerate(flow.module.parameters()):
            weights.add_(0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(number)))
    return flow


def of_diffusers(folder: Path) -> VelocityModel:
    return open_flow(folder, role="student", height=32, width=24)


#: How a model is made, and how one is opened again.
MODELS: dict[str, tuple[Callable[[], VelocityModel], Callable[[Path], VelocityModel]]] = {
    "small, points": (lambda: small((2,)), SmallFlow.open),
    "small, images": (lambda: small((3, 8, 8)), SmallFlow.open),
    "sd3": (lambda: PipelineFlow(flow_models.sd3(), height=32, width=24), of_diffusers),
    "flux": (lambda: PipelineFlow(flow_models.flux(), height=32, width=24), of_diffusers),
}
#: Those of diffusers, which has an environment of its own (`make flow`).
DIFFUSERS = ("sd3", "flux")
EACH = [pytest.param(name, marks=pytest.mark.flow) if name in DIFFUSERS else name for name in MODELS]


@cache
def made(name: str) -> VelocityModel:
    return MODELS[name][0]()


@pytest.fixture(params=EACH)
def model(request: pytest.FixtureRequest) -> VelocityModel:
    return made(request.param)


def inputs(model: VelocityModel, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, *model.latent_shape, generator=generator, dtype=dtype)
    sigmas_N = torch.rand(rows, generator=generator, dtype=dtype)
    return latents, sigmas_N, model.condition([TEXTS[row % len(TEXTS)] for row in range(rows)])


def test_it_keeps_the_protocol(model: VelocityModel) -> None:
    assert isinstance(model, VelocityModel)
    assert {"architecture", "schedule"} <= model.identity.keys()
    assert all(isinstance(words, str) and words for words in model.identity.values())


def test_a_velocity_has_the_shape_of_its_latent_and_depends_on_everything(model: VelocityModel) -> None:
    latents, sigmas_N, asked = inputs(model, 6)
    with torch.no_grad():
        velocity = model.velocity(latents, sigmas_N, asked)
        assert velocity.shape == latents.shape and velocity.isfinite().all()
        others = (
            model.velocity(latents + 0.1, sigmas_N, asked),
            model.velocity(latents, 0.5 * sigmas_N, asked),
            model.velocity(latents, sigmas_N, asked.rows(torch.tensor([1, 2, 0, 4, 5, 3]))),
        )
    for other in others:
        assert ((velocity - other).flatten(1).norm(dim=1) > 1e-6).all()


def test_rows_are_the_same_whatever_the_batch(model: VelocityModel) -> None:
    model.module.double()
    try:
        latents, sigmas_N, asked = inputs(model, 5, torch.float64)
        with torch.no_grad():
            together = model.velocity(latents, sigmas_N, asked)
            alone = [
                model.velocity(latents[row : row + 1], sigmas_N[row : row + 1], asked.rows(torch.tensor([row])))
                for row in range(5)
            ]
        assert together.dtype == torch.float64
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    finally:
        model.module.float()


def test_a_condition_is_the_same_whatever_stands_beside_it(model: VelocityModel) -> None:
    together = model.condition(TEXTS)
    assert len(together) == len(TEXTS)
    alone = Condition.joined([model.condition([text]) for text in TEXTS])
    assert together.tensors.keys() == alone.tensors.keys()
    for name, values in together.tensors.items():
        torch.testing.assert_close(values, alone.tensors[name], rtol=1e-5, atol=1e-5)


def test_the_gradient_reaches_the_module_alone(model: VelocityModel) -> None:
    latents, sigmas_N, asked = inputs(model, 3)
    assert not any(values.requires_grad for values in asked.tensors.values())  # text encoders are no part of it
    model.velocity(latents, sigmas_N, asked).square().sum().backward()
    grads = [own.grad for own in model.module.parameters()]
    assert all(own is None or own.isfinite().all() for own in grads)
    assert sum(own is not None and bool(own.any()) for own in grads) > 0.8 * len(grads)
    assert latents.grad is None and sigmas_N.grad is None
    model.module.zero_grad()


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_noise_levels_fall_to_zero(model: VelocityModel, steps: int) -> None:
    sigmas = model.sigmas(steps)
    assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), torch.float64)
    assert 0 < sigmas[0] <= 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_samples_are_decoded(model: VelocityModel) -> None:
    latents = 2 * torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        samples = model.decoded(latents)
    assert len(samples) == 2 and samples.isfinite().all()
    if len(model.latent_shape) == 3:
        assert samples.ndim == 4 and samples.shape[1] == 3
        assert samples.min() >= 0 and samples.max() <= 1


@pytest.mark.parametrize("name", EACH)
def test_what_is_saved_opens_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save(tmp_path / "saved")
    again = MODELS[name][1](tmp_path / "saved")
    assert again.identity == model.identity and again.latent_shape == model.latent_shape
    latents, sigmas_N, asked = inputs(model, 3)
    with torch.no_grad():
        first = model.velocity(latents, sigmas_N, asked)
        second = again.velocity(latents, sigmas_N, again.condition([TEXTS[row % len(TEXTS)] for row in range(3)]))
    assert torch.equal(first, second)
