"""What students of flow matching are compared with: GRPO on denoising steps, by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flows.batch import GROUPS, NOISE, REWARDS, SAMPLERS, Flow, velocity
from torch import Tensor

from retort.errors import UserError
from retort.flows import Sampler, denoising_step
from retort.loss.latents import check_latents

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("flow_methods")


def logp(flow: Flow) -> Tensor:
    """The student's log-density of each next latent, live, by torch's own distributions."""
    mean, std_N = denoising_step(
        flow.sampler, velocity(flow.weights, flow.latents), flow.latents, flow.sigmas, flow.next_sigmas, NOISE
    )
    return torch.distributions.Normal(mean, std_N[:, None, None]).log_prob(flow.next_latents).sum((1, 2))


def advantages() -> Tensor:
    """Of each trajectory, from the definition: against its prompt's, over the deviation of a sample."""
    found = torch.zeros_like(REWARDS)
    for group in GROUPS.unique():
        own = REWARDS[group == GROUPS]
        found[group == GROUPS] = (own - own.mean()) / (own.std() + 1e-6)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_its_gradient_is_that_of_the_score_function(ours: ModuleType, sampler: Sampler) -> None:
    flow = Flow(sampler)
    losses = flow.losses(ours.grpo_mix(), teacher_velocity=None, extra_views={})
    by_hand = -(advantages()[flow.rollouts] * logp(flow)).mean()
    expected = torch.autograd.grad(by_hand, flow.weights)[0]
    torch.testing.assert_close(flow.gradient(losses), expected, rtol=1e-10, atol=1e-11)
    assert expected.abs().max() > 0.01


def test_a_second_update_is_weighed_by_the_ratio_and_clipped(ours: ModuleType) -> None:
    flow = Flow()
    old = logp(flow).detach() - 0.1 * torch.arange(len(flow.latents)) / len(flow.latents)
    advantage_N = advantages()[flow.rollouts]
    ratio_N = (logp(flow) - old).exp()
    plain = flow.losses(ours.grpo_mix(), old_logp=old, teacher_velocity=None, extra_views={})
    torch.testing.assert_close(plain.loss, -(ratio_N * advantage_N).mean(), rtol=1e-10, atol=1e-11)
    clipped = flow.losses(ours.grpo_mix(clip=0.05), old_logp=old, teacher_velocity=None, extra_views={})
    expected = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.95, 1.05) * advantage_N).mean()
    torch.testing.assert_close(clipped.loss, expected, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(clipped.loss, plain.loss)


def test_the_reference_adds_its_kl(ours: ModuleType) -> None:
    flow = Flow()
    base = {"base": velocity(flow.others["base"], flow.latents)}
    alone = flow.losses(ours.grpo_mix(), teacher_velocity=None, extra_views={})
    held = flow.losses(ours.grpo_mix(reference_coef=0.04), teacher_velocity=None, extra_views=base)
    kl = flow.losses("diffusion_opd", teacher_velocity=base["base"], extra_views={})
    torch.testing.assert_close(held.loss, alone.loss + 0.04 * kl.loss, rtol=1e-11, atol=1e-12)
    with pytest.raises(UserError, match="at least 0"):
        ours.grpo_mix(reference_coef=-1.0)


def test_it_needs_rewards_groups_and_no_teacher(ours: ModuleType) -> None:
    method = ours.grpo_mix()
    check_latents(method)
    assert method.needs_rewards and method.needs_groups and not method.views and not method.needs_latents
    for missing in ({"rewards": None}, {"groups": None}):
        with pytest.raises(UserError, match=next(iter(missing))) as caught:
            Flow().losses(method, teacher_velocity=None, extra_views={}, **missing)
        assert "\n" not in str(caught.value)


def test_the_agents_method_without_its_teacher_is_the_same(ours: ModuleType) -> None:
    """`sod` with `coef=0`, which the library has: so plain GRPO can be run by name."""
    from retort import registry

    flow = Flow()
    named = registry.load("sod", coef=0.0)
    ours_ = flow.losses(ours.grpo_mix(), teacher_velocity=None, extra_views={})
    torch.testing.assert_close(flow.losses(named).loss, ours_.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(flow.gradient(flow.losses(named)), flow.gradient(ours_), rtol=1e-11, atol=1e-12)
