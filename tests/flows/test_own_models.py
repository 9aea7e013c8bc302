"""Velocity models of a caller's own that break the contract: one line says what is wrong, before or where it is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flowing
import pytest
import torch
from torch import Tensor, nn

from retort.core.rollouts import Message, Prompt
from retort.errors import RunError, UserError
from retort.evaluate.flows import FlowEvaluator
from retort.flows import Condition, FlowModel, Noise
from retort.flows.sampling import FlowRequest, FlowSampling, samples
from retort.teachers.flow import refuse_other_flow

REQUESTS = [FlowRequest("upper moon", (0, "evaluation", n), (0, "evaluation")) for n in range(2)]


class Own:
    """A velocity model of a few lines, any method of which may be another."""

    def __init__(self, **methods: Any) -> None:
        self.module: nn.Module = nn.Linear(2, 2)
        self.latent_shape: tuple[int, ...] = (2,)
        self.identity = {"architecture": "own", "schedule": "own"}
        for name, method in methods.items():
            setattr(self, name, method)

    def condition(self, texts: Any) -> Any:
        return Condition({"length": torch.tensor([[float(len(text))] for text in texts])})

    def velocity(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Any:
        return self.module(latents) + condition.tensors["length"]

    def sigmas(self, steps: int) -> Any:
        return torch.linspace(1.0, 0.0, steps + 1)

    def decoded(self, latents: Tensor) -> Any:
        return latents

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


def flow(**methods: Any) -> FlowModel:
    return FlowModel(Own(**methods), "mine")


@pytest.mark.parametrize(
    ("velocity", "words"),
    [
        (lambda x, s, c: torch.zeros(len(x), 1), "1) torch.float32"),
        (lambda x, s, c: torch.zeros(1, 2), "not (1, 2)"),
        (lambda x, s, c: torch.zeros(len(x), 2).long(), "2) torch.int64"),
        (lambda x, s, c: (x,), "not a tuple"),
    ],
    ids=["narrow", "one row", "integers", "tuple"],
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_velocity_of_another_shape_is_never_stretched_to_fit(velocity: Any, words: str, guidance: float) -> None:
    own = flow(velocity=velocity)
    own.guidance = guidance
    with pytest.raises(UserError, match="^mine: its velocity must be a tensor of floats") as error:
        samples(own, REQUESTS, steps=2, batch=2)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        (lambda n: torch.linspace(1, 0, n), "a tensor of 3 floats, not (2,)"),
        (lambda n: [1.0, 0.5, 0.0], "not a list"),
        (lambda n: torch.linspace(1, 0.1, n + 1), "they go from 1 to 0.1"),
        (lambda n: torch.linspace(0, 1, n + 1), "they go from 0 to 1"),
        (lambda n: torch.linspace(1000, 0, n + 1), "they go from 1000 to 0"),
    ],
    ids=["short", "list", "noise left", "rising", "thousands"],
)
def test_noise_levels_fall_from_at_most_1_to_0(sigmas: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        samples(flow(sigmas=sigmas), REQUESTS, steps=2, batch=2)
    assert words in str(error.value)


@pytest.mark.parametrize("rows", [None, 0, 3])
def test_a_condition_has_a_row_for_each_prompt(rows: int | None) -> None:
    found = None if rows is None else Condition({"length": torch.zeros(rows, 1)} if rows else {})
    with pytest.raises(UserError, match="^mine: its condition of 1 prompts must be a `retort.flows.Condition`"):
        samples(flow(condition=lambda texts: found), REQUESTS, steps=2, batch=2)


def evaluator() -> FlowEvaluator:
    sampling = FlowSampling(Noise("sde", 0.7), 3, None, None, 4)
    prompts = [Prompt("1", (Message("user", "upper moon"),))]
    return FlowEvaluator(prompts, None, samples=2, steps=2, seed=0, batch=4, sampling=sampling)


def test_a_sample_for_each_latent() -> None:
    with pytest.raises(UserError, match=r"^mine: its decoded of 2 latents must be a tensor \[2, ...\], not \(1, 2\)"):
        evaluator().evaluate(flow(decoded=lambda latents: latents[:1]))


@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 3, 8, 8), (2, 100), ()])
def test_samples_that_are_no_pictures_are_not_shown(shape: tuple[int, ...]) -> None:
    row = evaluator().evaluate(flow(decoded=lambda latents: torch.rand(len(latents), *shape)))
    assert "samples" not in row


def test_a_teacher_in_closed_form_has_no_weights() -> None:
    exact = flow(module=nn.Identity(), velocity=lambda x, s, c: x)
    assert samples(exact, REQUESTS, steps=2, batch=2).shape == (2, 2) and exact.dtype == torch.float32


def test_noise_levels_are_compared_and_not_only_their_names() -> None:
    with pytest.raises(UserError, match="step 6 is at noise level 0.25, the student's at 0.5"):
        refuse_other_flow(flow(), flow(sigmas=lambda n: torch.linspace(1, 0, n + 1) ** 2))
    refuse_other_flow(flow(), flow())


def test_a_frozen_model_that_is_broken_has_not_diverged() -> None:
    broken = flowing.flow(0)
    broken.module.patch_out.bias.data.fill_(float("nan"))  # pyright: ignore
    with pytest.raises(RunError, match="it does not learn here, so its weights are broken"):
        samples(FlowModel(broken, "mine", frozen=True), REQUESTS, steps=2, batch=2)
    with pytest.raises(RunError, match="has diverged"):
        samples(FlowModel(broken, "mine"), REQUESTS, steps=2, batch=2)
