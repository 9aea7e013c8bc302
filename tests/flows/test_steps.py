"""Decided steps end to end, in the order of the table of a pack, and a model's Gaussians at them."""

from __future__ import annotations

import pytest
import torch
from flows.linear import F64, model, velocity_of
from flows.paths import prompts, rollouts, sampling

from retort.core.gaussian import Gaussian as Policy
from retort.core.random_streams import generator
from retort.core.rollouts import Pack, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Gaussian
from retort.core.steps import NO_TOKEN
from retort.core.trajectory import Noise, Trajectory
from retort.errors import UserError
from retort.flows import denoising_step
from retort.flows.steps import DecidedSteps, gaussian_of, step_of
from retort.loss.latents import latent_losses
from retort.ranks import WHOLE_BATCH, Share, World
from retort.registry import load


def path_of(rollout: Rollout) -> Trajectory:
    assert isinstance(rollout.sequence, Trajectory)
    return rollout.sequence


@pytest.mark.parametrize("window", [None, 2])
def test_they_lie_as_a_pack_lays_them(window: int | None) -> None:
    own = rollouts(how=sampling(window=window))
    steps, pack = DecidedSteps.of_rollouts(own), Pack.of(own)
    assert len(steps) == len(pack) == len(own) * (window or 4)
    assert pack.steps.tokens_N.unique().tolist() == [NO_TOKEN]
    for number in range(len(steps)):
        rollout = own[int(pack.steps.rollout_N[number])]
        path = path_of(rollout)
        at = int(path.from_A[int(pack.steps.position_N[number])])
        assert torch.equal(steps.latents[number], path.latents[at])
        assert torch.equal(steps.next_latents[number], path.latents[at + 1])
        assert torch.equal(steps.decided_ND[number], path.latents[at + 1].flatten())
        assert float(steps.sigmas_N[number]) == float(path.sigmas_L[at])
        assert float(steps.next_sigmas_N[number]) == float(path.sigmas_L[at + 1])
        assert steps.texts[number] == rollout.prompt.text
    assert steps.noise == Noise("sde", 0.7, 0.8)
    assert steps.sigmas_N.dtype == F64


def test_a_step_is_the_models_gaussian_where_the_step_began() -> None:
    own, flow = rollouts(), model(seed=3, guidance=2.0)
    steps = DecidedSteps.of_rollouts(own)
    found = step_of(flow, steps)
    rows = zip(steps.latents, steps.sigmas_N.tolist(), steps.texts, strict=True)
    v = torch.stack([velocity_of(flow, latents, sigma, text) for latents, sigma, text in rows])
    mean, std_N = denoising_step("sde", v, steps.latents, steps.sigmas_N, steps.next_sigmas_N, 0.7, sigma_max=0.8)
    torch.testing.assert_close(found.mean, mean, rtol=1e-11, atol=1e-11)
    assert torch.equal(found.std_N, std_N)


def test_its_gradient_reaches_every_parameter_and_is_that_of_finite_differences() -> None:
    flow, steps = model(seed=3), DecidedSteps.of_rollouts(rollouts())
    weights = flow.of.module.weight  # type: ignore[union-attr]

    def logp() -> torch.Tensor:
        mean, std_N = step_of(flow, steps)
        return Policy(mean.flatten(1), std_N).logp_of(steps.decided_ND).sum()

    gradient = torch.autograd.grad(logp(), list(flow.trainable().values()))
    assert all(bool((one != 0).any()) for one in gradient)
    with torch.no_grad():
        ends = []
        for side in (1e-6, -1e-6):
            weights[1, 2] += side
            ends.append(float(logp()))
            weights[1, 2] -= side
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient[0][1, 2]), rel=1e-5)


def test_the_student_that_decided_gives_its_own_noise_as_the_distance() -> None:
    """Mean and deviation at a stored step are those by which it was decided: the noise is what was drawn."""
    flow = model()
    own = rollouts(flow, sampling("cps"))
    steps = DecidedSteps.of_rollouts(own)
    mean, std_N = step_of(flow, steps)
    z = ((steps.next_latents - mean) / std_N[:, None, None]).detach().reshape(len(own), 4, 2, 3)
    for row, rollout in enumerate(own):
        for step in range(4):
            key = (0, "rollouts", rollout.prompt.id, rollout.member, "step", step)
            drawn = torch.randn(2, 3, generator=generator(*key)).double()  # type: ignore[arg-type]
            torch.testing.assert_close(z[row, step], drawn, rtol=1e-9, atol=1e-9)


def test_some_of_them_are_those_rows() -> None:
    steps, flow = DecidedSteps.of_rollouts(rollouts()), model(seed=3)
    chosen = torch.tensor([7, 0, 7, 3])
    some = steps.select(chosen).to("cpu")
    assert some.texts == tuple(steps.texts[index] for index in (7, 0, 7, 3))
    assert some.noise == steps.noise
    torch.testing.assert_close(step_of(flow, some).mean, step_of(flow, steps).mean[chosen], rtol=1e-12, atol=1e-12)
    assert torch.equal(step_of(flow, some).std_N, step_of(flow, steps).std_N[chosen])


def test_in_batches_and_without_gradient_it_is_the_same() -> None:
    steps, flow = DecidedSteps.of_rollouts(rollouts()), model(seed=3)
    whole, found = step_of(flow, steps), gaussian_of(flow, steps, batch=5)
    torch.testing.assert_close(found.mean_ND, whole.mean.flatten(1).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.std_N, whole.std_N)
    assert not found.mean_ND.requires_grad
    assert max(flow.of.rows[1:]) == 5  # type: ignore[union-attr]


def test_steps_of_trajectories_go_into_the_losses() -> None:
    """The KL of two models on stored steps, by the code that methods run, against the formula on their means."""
    own, student, teacher = rollouts(), model(), model(seed=3)
    steps = DecidedSteps.of_rollouts(own)
    mean, std_N = step_of(student, steps)
    other = gaussian_of(teacher, steps, batch=5)
    signal = Gaussian.of(other.mean_ND, other.std_N, steps.decided_ND)
    losses = latent_losses(
        load("flow_opd"),
        Policy(mean.flatten(1), std_N),
        steps.decided_ND,
        {"teacher": signal},
        rollouts=Pack.of(own).steps.rollout_N,
    )
    by_hand = (mean.flatten(1) - other.mean_ND).square().sum(1) / (2 * std_N.square())
    torch.testing.assert_close(losses.terms["distillation"].value, by_hand.detach(), rtol=1e-11, atol=1e-11)
    losses.loss.backward()
    assert student.of.module.weight.grad is not None  # type: ignore[union-attr]
    assert teacher.of.module.weight.grad is None  # type: ignore[union-attr]


def test_several_kinds_of_noise_are_refused() -> None:
    two = [*rollouts(how=sampling("sde")), *rollouts(how=sampling("cps"))]
    with pytest.raises(UserError, match=r"add noise in 2 ways \(Noise\(sampler='sde'.*; Noise\(sampler='cps'"):
        DecidedSteps.of_rollouts(two)
    undecided = Trajectory.of_states(torch.zeros(3, 2), torch.tensor([1.0, 0.5, 0.0]), torch.zeros(2), None)
    with pytest.raises(UserError, match="these trajectories decide no step"):
        DecidedSteps.of([undecided], ["a"])


def test_a_rollout_of_tokens_is_refused_by_name() -> None:
    text = Rollout(prompts()[1], TokenSequence.of([1]).then([2], decided=True))
    with pytest.raises(UserError, match="prompt 'two moons, and a third': its rollout is no trajectory of latents"):
        DecidedSteps.of_rollouts([*rollouts(), text])


class Ranks(World):
    """One of two ranks, for what needs no exchange."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2


def test_groups_packs_and_ranks_take_trajectories_as_they_take_texts() -> None:
    own = rollouts(members=2)
    groups = in_groups(own)
    assert [len(group) for group in groups] == [2, 2, 2]
    pack = Pack.of(own)
    assert pack.group_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert pack.reward_R.tolist() == [0.0, 1.0] * 3
    assert pack.steps.position_N.tolist() == [0, 1, 2, 3] * 6
    assert [one.tokens for one in own] == [6] * 6, "ranks divide states"
    steps = DecidedSteps.of_rollouts(own)
    shares = [Share.of(groups, Ranks(rank)) for rank in (0, 1)]
    assert [len(range(24)[share.steps]) for share in shares] == [8, 16]
    for share in shares:
        asked = [rollout for group in groups[share.groups] for rollout in group]
        mine = torch.arange(24)[share.steps]
        theirs = DecidedSteps.of_rollouts(asked).select(share.local(mine))
        assert torch.equal(theirs.latents, steps.select(mine).latents)
    assert Share.of(groups, World()) is WHOLE_BATCH
