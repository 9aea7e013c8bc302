"""From noise to data: against loops written out, in float64, and the same whatever the batch."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from flows.linear import F64, Linear, model, velocity_of

from retort.core.random_streams import generator
from retort.errors import RunError, UserError
from retort.flows import FlowModel, Noise, Sampler, Trajectory, denoising_step
from retort.flows.sampling import FlowRequest, FlowSampling, decoded, denoise, samples

SAMPLERS: tuple[Sampler, ...] = ("sde", "cps", "dance_sde")
TEXTS = ("", "a ring", "two moons, and then a third one")


def request(text: str, member: int = 0, *, seed: int = 0, visit: int = 0) -> FlowRequest:
    return FlowRequest(text, (seed, "rollouts", text, visit, member), (seed, "rollouts", text, visit))


REQUESTS = [request(text, member) for text in TEXTS for member in range(3)]


def sampling(sampler: Sampler = "sde", **changes: Any) -> FlowSampling:
    given: dict[str, Any] = {"steps": 5, "window": None, "window_end": None, "batch": 4}
    return FlowSampling(Noise(sampler, 0.7), **given | changes)


def normal(one: FlowRequest, *parts: str | int) -> torch.Tensor:
    return torch.randn(2, 3, generator=generator(*one.noise, *parts)).double()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_is_the_loop_written_out(sampler: Sampler, guidance: float) -> None:
    flow = model(guidance=guidance)
    found = denoise(flow, REQUESTS, sampling(sampler))
    for one, path in zip(REQUESTS, found, strict=True):
        x = normal(one)
        states = [x]
        for step, (sigma, then) in enumerate(((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0))):
            v = velocity_of(flow, x, sigma, one.text).detach()
            if step < 4:
                at = torch.tensor([sigma], dtype=F64), torch.tensor([then], dtype=F64)
                mean, std = denoising_step(sampler, v[None], x[None], *at, 0.7, sigma_max=0.8)
                x = mean[0] + std[0] * normal(one, "step", step)
            else:
                x = x + v * (then - sigma)
            states.append(x)
        torch.testing.assert_close(path.latents, torch.stack(states), rtol=1e-11, atol=1e-11)
        assert path.steps == 4
        assert path.from_A.tolist() == [0, 1, 2, 3]
        assert path.noise == Noise(sampler, 0.7, 0.8)
        torch.testing.assert_close(path.sigmas_L, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], dtype=F64))


def test_nothing_of_a_trajectory_depends_on_what_else_is_asked_for() -> None:
    flow = model(guidance=2.0)
    whole = denoise(flow, REQUESTS, sampling(window=2, batch=64))
    turned = denoise(flow, REQUESTS[::-1], sampling(window=2, batch=2))[::-1]
    alone = [denoise(flow, [one], sampling(window=2))[0] for one in REQUESTS]
    for one, other, third in zip(whole, turned, alone, strict=True):
        for again in (other, third):
            torch.testing.assert_close(one.latents, again.latents, rtol=1e-12, atol=1e-12)
            assert torch.equal(one.latents[0], again.latents[0])
            assert torch.equal(one.from_A, again.from_A)
    again = denoise(flow, REQUESTS, sampling(window=2, batch=64))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(whole, again, strict=True))
    firsts = {tuple(path.latents[0].flatten().tolist()) for path in whole}
    assert len(firsts) == len(REQUESTS), "each has noise of its own"


def test_without_noise_it_is_eulers_loop_from_the_same_first_state() -> None:
    flow = model(guidance=2.0)
    found = samples(flow, REQUESTS, steps=7, batch=4)
    paths = denoise(flow, REQUESTS, sampling())
    for one, last, path in zip(REQUESTS, found, paths, strict=True):
        x = normal(one)
        assert torch.equal(x, path.latents[0])
        for step in range(7):
            x = x + velocity_of(flow, x, 1 - step / 7, one.text).detach() * (-1 / 7)
        torch.testing.assert_close(last, x, rtol=1e-11, atol=1e-11)
    other = denoise(model(seed=5), REQUESTS, sampling("cps"))
    assert all(torch.equal(one.latents[0], two.latents[0]) for one, two in zip(paths, other, strict=True))
    assert samples(flow, [], steps=3, batch=4).shape == (0, 2, 3)
    assert denoise(flow, [], sampling()) == []


def test_with_ever_less_noise_a_trajectory_ends_where_the_sample_without_noise_does() -> None:
    flow = model()
    quiet = replace(sampling("dance_sde"), noise=Noise("dance_sde", 1e-7))
    ends = torch.stack([path.last for path in denoise(flow, REQUESTS, quiet)])
    torch.testing.assert_close(ends, samples(flow, REQUESTS, steps=5, batch=4), rtol=1e-5, atol=1e-5)


def test_the_noise_that_a_trajectory_holds_is_standard_normal() -> None:
    """What was decided, less its mean, in standard deviations: 4,000 numbers a step."""
    flow, many = model(), [request("a ring", member) for member in range(700)]
    paths = denoise(flow, many, sampling("sde", batch=700))
    for step in range(4):
        x, then = (torch.stack([path.latents[at] for path in paths]) for at in (step, step + 1))
        v = torch.stack([velocity_of(flow, own, 1 - step / 5, "a ring") for own in x]).detach()
        at = (torch.full((700,), 1 - own / 5, dtype=F64) for own in (step, step + 1))
        mean, std_N = denoising_step("sde", v, x, *at, 0.7, sigma_max=0.8)
        z = ((then - mean) / std_N[:, None, None]).flatten()
        assert abs(float(z.mean())) < 4 / math.sqrt(len(z))
        assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / len(z))


def test_a_window_is_shared_by_a_group_and_drawn_anew_for_every_visit() -> None:
    flow, within = model(), sampling("cps", steps=8, window=2, window_end=5)
    starts = set[int]()
    for visit in range(40):
        group = denoise(flow, [request("a ring", member, visit=visit) for member in range(3)], within)
        begins = {tuple(path.from_A.tolist()) for path in group}
        assert len(begins) == 1
        first, second = begins.pop()
        assert second == first + 1
        starts.add(first)
    assert starts == {0, 1, 2, 3}
    assert {tuple(sampling(steps=8).decided((0, "rollouts", visit))) for visit in range(9)} == {tuple(range(7))}


def test_outside_of_its_window_a_trajectory_has_no_noise() -> None:
    flow, one = model(), request("a ring")
    path = denoise(flow, [one], sampling("cps", steps=6, window=1))[0]
    noisy = int(path.from_A[0])
    for step in range(6):
        x, then = path.latents[step], path.latents[step + 1]
        euler = x + velocity_of(flow, x, 1 - step / 6, "a ring").detach() * (-1 / 6)
        assert torch.allclose(then, euler, rtol=1e-11, atol=1e-11) == (step != noisy)
    assert path.action_mask_L.tolist() == [place == noisy + 1 for place in range(7)]


def test_latents_are_fp32_on_the_cpu_and_keep_no_gradient_and_no_other_latents() -> None:
    own = Linear()
    own.module.float()
    flow = FlowModel(own, "a flow")
    path = denoise(flow, REQUESTS, sampling())[1]
    assert path.latents.dtype == torch.float32
    assert path.latents.device.type == "cpu"
    assert not path.latents.requires_grad
    assert samples(flow, REQUESTS, steps=2, batch=3).dtype == torch.float32
    assert path.latents.untyped_storage().nbytes() == 6 * 2 * 3 * 4
    sent = pickle.loads(pickle.dumps(path))
    assert isinstance(sent, Trajectory)
    assert torch.equal(sent.latents, path.latents)
    assert sent.steps == 4
    assert not any(parameter.grad is not None for parameter in own.module.parameters())


def test_a_batch_holds_no_more_than_was_asked_for_and_a_prompt_is_read_once() -> None:
    flow = model(guidance=3.0)
    denoise(flow, REQUESTS, sampling(batch=4))
    samples(flow, REQUESTS, steps=2, batch=4)
    assert isinstance(flow.of, Linear)
    assert max(flow.of.rows) == 8, "four latents, with the prompt and without"
    assert sorted(flow.of.encoded) == sorted(TEXTS)


def test_decoded_samples_are_whole_whatever_the_batch() -> None:
    flow = model()
    latents = samples(flow, REQUESTS, steps=3, batch=9)
    assert torch.equal(decoded(flow, latents, batch=2), latents.float())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps": 1}, "flow.steps = 1: the last step adds no noise, so give 2 or more"),
        ({"batch": 0}, "flow.batch = 0: give 1 or more"),
        ({"window": 5}, "flow.window = 5 does not fit into the first 4 of flow.steps = 5; give 1 to 4"),
        ({"window": 0}, "flow.window = 0 does not fit into the first 4"),
        ({"window": 3, "window_end": 2}, "flow.window = 3 does not fit into the first 2 of flow.steps = 5"),
        ({"window": 2, "window_end": 5}, "flow.window_end = 5: of flow.steps = 5 only the first 4 add noise"),
        ({"window_end": 3}, "flow.window_end = 3 without flow.window: give the window's length, too"),
    ],
    ids=["one step", "no batch", "long", "empty", "beyond its end", "end beyond", "end alone"],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        sampling(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        (Noise("cps", 1.5), "noise_level of sampler 'cps' must be at most 1"),
        (Noise("sde", 0.0), "noise_level is 0: without noise a step is certain"),
        (Noise("dance_sde", -1.0), "noise_level must be a positive number, not -1.0"),
        (Noise("dance", 0.5), "unknown sampler 'dance'; did you mean 'dance_sde'?"),  # type: ignore[arg-type]
    ],
    ids=["above 1", "none", "negative", "unknown"],
)
def test_noise_out_of_range_is_refused_before_anything_is_computed(noise: Noise, line: str) -> None:
    with pytest.raises(UserError, match=line):
        FlowSampling(noise, steps=5, window=None, window_end=None, batch=1)


def test_a_model_that_diverged_is_named_with_the_prompt() -> None:
    flow = model(name="the student")
    with torch.no_grad():
        flow.of.module.weight.fill_(1e200)  # type: ignore[union-attr]
    for run in (
        lambda: denoise(flow, REQUESTS, sampling()),
        lambda: samples(flow, REQUESTS, steps=5, batch=4),
    ):
        with pytest.raises(RunError, match="the student: latents of prompt '' are not finite after step 2 of 5"):
            run()
