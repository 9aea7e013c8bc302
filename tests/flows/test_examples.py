"""The cold start of a flow: examples are decided steps like any other, and their loss is that of flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flows.linear import F64, Linear, model
from torch import Tensor

from retort.core.gaussian import Gaussian as Policy
from retort.core.losses import TokenLosses
from retort.core.random_streams import generator
from retort.core.signals import Gaussian
from retort.core.trajectory import Noise, Straight, Trajectory
from retort.errors import UserError
from retort.flows import FlowModel
from retort.flows.examples import LEAST_SIGMA, example, examples
from retort.flows.samplers import decided_step, denoising_step, straight
from retort.flows.sampling import FlowRequest, FlowSampling, Key, samples
from retort.flows.steps import DecidedSteps, gaussian_of, step_of
from retort.loss.latents import check_latents, latent_losses
from retort.method import Method
from retort.methods._cold_start import with_cold_start
from retort.registry import load

TEXTS = ("a ring", "two moons, and a third", "a", "a ring")


def keys(count: int = 4, *more: str) -> list[Key]:
    return [(0, "teacher", "example", number, *more) for number in range(count)]


def requests(texts: Sequence[str] = TEXTS) -> list[FlowRequest]:
    return [FlowRequest(text, key, key) for text, key in zip(texts, keys(len(texts), "noise"), strict=True)]


def given(teacher: FlowModel, **more: Any) -> list[Trajectory]:
    return examples([teacher] * len(TEXTS), requests(), keys(), **{"count": 3, "steps": 6, "batch": 3, **more})


def cold(loss: str = "sft") -> Method:
    """What a run does first where `cold_start.steps` is set, whatever its method."""
    method = with_cold_start(load("flow_opd"), 3, loss=loss)  # type: ignore[arg-type]
    assert method.before is not None
    return method.before[1]


def losses(method: Method, student: FlowModel, steps: DecidedSteps, teacher: FlowModel | None = None) -> TokenLosses:
    step = step_of(student, steps)
    policy = Policy(step.mean.flatten(1), step.std_N)
    said = gaussian_of(teacher or student, steps, batch=8)
    signal = Gaussian.of(said.mean_ND, said.std_N, steps.decided_ND)
    return latent_losses(method, policy, steps.decided_ND, {"teacher": signal})


def flow_matching(student: FlowModel, samples_n: Tensor, texts: Sequence[str]) -> Tensor:
    """Mean square errors of the velocity, from its definition and the keys of the draws, three of each sample."""
    errors: list[Tensor] = []
    for sample, text, key in zip(samples_n, texts, keys(len(texts)), strict=True):
        sigmas = 1.0 - (1.0 - LEAST_SIGMA) * torch.rand(3, generator=generator(*key, "example", "sigma"), dtype=F64)
        noises = torch.randn(3, *sample.shape, generator=generator(*key, "example", "noise")).to(F64)
        for sigma, noise in zip(sigmas, noises, strict=True):
            v = student.velocity(((1 - sigma) * sample + sigma * noise)[None], sigma[None], [text])[0]
            errors.append((v - (noise - sample)).square().mean())
    return torch.stack(errors)


def weights(flow: FlowModel) -> list[Tensor]:
    return list(flow.trainable().values())


def test_the_cold_start_of_a_method_is_flow_matching_on_the_teachers_samples() -> None:
    """The very method that a text's cold start has: value and gradient are those of the definition."""
    student, teacher = model(seed=1), model(seed=2)
    steps = DecidedSteps.of(given(teacher), TEXTS)
    found = losses(cold(), student, steps)
    assert len(steps) == 12
    there = samples(teacher, requests(), steps=6, batch=8)
    by_definition = flow_matching(student, there, TEXTS)
    torch.testing.assert_close(found.terms["sft"].value, by_definition, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, by_definition.mean(), rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(found.loss, weights(student))
    theirs = torch.autograd.grad(by_definition.mean(), weights(student))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)


def test_against_a_teacher_they_are_the_mean_square_difference_of_two_velocities() -> None:
    student, teacher = model(seed=1), model(seed=2)
    steps = DecidedSteps.of(given(teacher), TEXTS)
    found = losses(cold("forward_kl"), student, steps, teacher)
    v, u = (own.velocity(steps.latents, steps.sigmas_N, steps.texts) for own in (student, teacher))
    torch.testing.assert_close(found.terms["forward_kl"].value, (v - u).square().flatten(1).mean(1))
    assert losses(cold("forward_kl"), student, steps, student).loss.item() == 0.0


@pytest.mark.parametrize("loss", ["sft", "forward_kl"])
def test_a_cold_start_passes_the_check_of_latents(loss: str) -> None:
    check_latents(cold(loss))


def test_the_likelihood_of_a_latent_is_above_the_least_that_its_noise_allows() -> None:
    """At the mean it is 0, as that of a token which is certain; elsewhere it differs from -log p by a constant."""
    draw = torch.Generator().manual_seed(0)
    mean, std = torch.randn(5, 3, generator=draw, dtype=F64), torch.rand(5, generator=draw, dtype=F64) + 0.1
    policy, at = Policy(mean, std), torch.randn(5, 3, generator=draw, dtype=F64)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std[:, None].expand_as(mean)), 1)
    torch.testing.assert_close(policy.best_logp(), normal.log_prob(mean), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy.logp_of(at), normal.log_prob(at), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        policy.best_logp() - policy.logp_of(at), 0.5 * ((at - mean) / std[:, None]).square().sum(1)
    )


def test_an_example_ends_at_the_sample_and_its_draws_are_its_keys() -> None:
    sample, key = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3), keys()[0]
    found = example(sample, key, count=400)
    assert found.steps == 400 and found.noise == Straight() and torch.equal(found.last, sample)
    steps = DecidedSteps.of([found], ["a"])
    assert bool((steps.next_latents == sample).all()) and not bool(steps.next_sigmas_N.any())
    sigmas = steps.sigmas_N
    assert LEAST_SIGMA <= sigmas.min() < 0.05 and 0.95 < sigmas.max() <= 1.0
    assert sigmas.mean().item() == pytest.approx(0.5, abs=0.08)
    noise = (steps.latents - (1 - sigmas)[:, None, None] * sample) / sigmas[:, None, None]
    assert noise.mean().item() == pytest.approx(0.0, abs=0.1) and noise.std().item() == pytest.approx(1.0, abs=0.1)
    again, other = example(sample, key, count=400), example(sample, keys()[1], count=400)
    assert torch.equal(again.latents, found.latents) and torch.equal(again.sigmas_L, found.sigmas_L)
    assert not torch.equal(other.sigmas_L, found.sigmas_L)


def test_batches_do_not_matter() -> None:
    teacher = model(seed=2)
    for mine, theirs in zip(given(teacher, batch=1), given(teacher, batch=4), strict=True):
        torch.testing.assert_close(mine.latents, theirs.latents, rtol=1e-12, atol=1e-12)
        assert torch.equal(mine.sigmas_L, theirs.sigmas_L)


def test_each_expert_is_asked_for_its_own_alone() -> None:
    experts = [model(seed=2), model(seed=3), model(seed=4)]
    asked = [experts[number] for number in (0, 1, 0, 1)]
    found = examples(asked, requests(), keys(), count=1, steps=6, batch=8)
    assert [isinstance(own.of, Linear) and own.of.rows for own in experts] == [[2] * 6, [2] * 6, []]
    for number, expert in enumerate(asked):
        (alone,) = samples(expert, [requests()[number]], steps=6, batch=8)
        torch.testing.assert_close(found[number].last, alone, rtol=1e-12, atol=1e-12)
    assert examples([], [], [], count=1, steps=6, batch=8) == []


def test_examples_and_steps_with_noise_are_not_learnt_together() -> None:
    states, sigmas = torch.zeros(2, 2, 3), torch.tensor([0.5, 0.25])
    noisy = Trajectory.of_states(states, sigmas, torch.ones(1), Noise("cps", 0.8))
    with pytest.raises(UserError, match="add noise in 2 ways") as caught:
        DecidedSteps.of([noisy, example(torch.zeros(2, 3), keys()[0])], ["a", "b"])
    assert "\n" not in str(caught.value)


def test_a_straight_step_is_no_sampler_and_every_other_is_as_it_was() -> None:
    latents, v = torch.ones(2, 3), torch.full((2, 3), 0.5)
    sigmas, then = torch.tensor([0.8, 0.5]), torch.tensor([0.0, 0.25])
    step = straight(v, latents, sigmas, then)
    torch.testing.assert_close(step.mean, torch.tensor([[0.6] * 3, [0.875] * 3]))
    torch.testing.assert_close(step.std_N, torch.tensor([0.8, 0.25]) * 1.5**0.5)
    for own, other in zip(decided_step(Straight(), v, latents, sigmas, then), step, strict=True):
        assert torch.equal(own, other)
    noisy = decided_step(Noise("sde", 0.7, 0.9), v, latents, sigmas, then)
    for own, other in zip(noisy, denoising_step("sde", v, latents, sigmas, then, 0.7, sigma_max=0.9), strict=True):
        assert torch.equal(own, other)
    with pytest.raises(UserError, match="unknown sampler 'straight'"):
        FlowSampling(Noise("straight", 1.0), 5, None, None, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sigma must fall"):
        straight(v, latents, then, sigmas)


def test_a_student_learns_what_its_teacher_makes() -> None:
    """Forty batches of examples at least halve the squared distance to the teacher's samples, from the same noise."""
    student, teacher = model((2,), seed=1), model((2,), seed=2)
    adam = torch.optim.Adam(weights(student), lr=0.1)
    there = [samples(own, requests(), steps=20, batch=8) for own in (student, teacher)]
    before = (there[0] - there[1]).square().mean()
    for batch in range(40):
        own: list[Key] = [(0, "teacher", batch, number) for number in range(32)]
        asked = [FlowRequest(text, key, key) for text, key in zip(TEXTS * 8, own, strict=True)]
        paths = examples([teacher] * len(asked), asked, own, count=1, steps=5, batch=64)
        loss = losses(cold(), student, DecidedSteps.of(paths, TEXTS * 8)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    after = (samples(student, requests(), steps=20, batch=8) - there[1]).square().mean()
    assert after < 0.5 * before, (float(before), float(after))
