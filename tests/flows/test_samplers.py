"""Denoising steps as Gaussians, in float64: against formulas written out, limits, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.divergences import gaussian_kl
from retort.errors import UserError
from retort.flows import Sampler, cps, dance_sde, denoising_step, sde

F64 = torch.float64
DRAW = torch.Generator().manual_seed(0)
V, OTHER, X = (torch.randn(3, 2, 4, generator=DRAW, dtype=F64) for _ in range(3))
SIGMAS, NEXT = torch.tensor([0.9, 0.6, 0.3], dtype=F64), torch.tensor([0.6, 0.3, 0.0], dtype=F64)


def step(sampler: Sampler, velocity: Tensor = V, **changes: Any) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {"latents": X, "sigmas": SIGMAS, "next_sigmas": NEXT, "noise_level": 0.7} | changes
    return denoising_step(sampler, velocity, **given)


def test_sde_is_the_formula_of_flow_grpo() -> None:
    mean, std = step("sde")
    for row, (sigma, then) in enumerate(zip(SIGMAS.tolist(), NEXT.tolist(), strict=True)):
        noise, d = 0.7 * math.sqrt(sigma / (1 - sigma)), then - sigma
        by_hand = X[row] * (1 + noise**2 * d / (2 * sigma)) + V[row] * (1 + noise**2 * (1 - sigma) / (2 * sigma)) * d
        torch.testing.assert_close(mean[row], by_hand, rtol=1e-13, atol=1e-13)
        assert std[row].item() == pytest.approx(noise * math.sqrt(-d), rel=1e-14)


def test_the_kl_of_means_is_that_of_velocities() -> None:
    """Both ways to write it: from means, and from velocities with the weight of the step."""
    for sampler, noise in (
        ("sde", 0.7 * (SIGMAS / (1 - SIGMAS)).sqrt()),
        ("dance_sde", torch.full((3,), 0.7, dtype=F64)),
    ):
        (mean, std), (other, _) = step(sampler), step(sampler, OTHER)  # type: ignore[arg-type]
        weight = (SIGMAS - NEXT) / 2 * (1 / noise + noise * (1 - SIGMAS) / (2 * SIGMAS)).square()
        of_velocities = weight * (V - OTHER).square().sum((1, 2))
        torch.testing.assert_close(gaussian_kl(mean, other, std), of_velocities, rtol=1e-12, atol=1e-12)


def test_dance_sde_drifts_along_the_score() -> None:
    """With the score of the marginal, -(x + (1 - sigma) v) / sigma: x + (v - eta^2 / 2 * score) d."""
    mean, std = step("dance_sde", noise_level=0.3)
    sigma, d = SIGMAS[:, None, None], (NEXT - SIGMAS)[:, None, None]
    score = -(X + (1 - sigma) * V) / sigma
    torch.testing.assert_close(mean, X + (V - 0.3**2 / 2 * score) * d, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(std, 0.3 * (SIGMAS - NEXT).sqrt())


def test_cps_keeps_the_size_of_the_noise() -> None:
    """Where data and noise are known, the next latent has the coefficients of its sigma: noise old and new together."""
    data, noise = V, OTHER
    rows, then = slice(0, 2), NEXT[:2, None, None]
    sigma = SIGMAS[rows, None, None]
    at = (1 - sigma) * data[rows] + sigma * noise[rows]
    mean, std = cps(noise[rows] - data[rows], at, SIGMAS[rows], NEXT[rows], 0.8)
    of_noise = (mean - (1 - then) * data[rows]) / noise[rows]
    torch.testing.assert_close(of_noise, of_noise[:, :1, :1].expand_as(of_noise), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_noise[:, 0, 0].square() + std.square(), NEXT[rows].square(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, NEXT[rows] * math.sin(0.4 * math.pi))


@pytest.mark.parametrize("sampler", ["sde", "cps", "dance_sde"])
def test_with_ever_less_noise_a_step_is_the_one_of_the_ode_and_the_kl_grows_without_bound(sampler: Sampler) -> None:
    rows: dict[str, Any] = {"latents": X[:2], "sigmas": SIGMAS[:2], "next_sigmas": NEXT[:2]}
    (mean, std), (other, _) = (step(sampler, v[:2], noise_level=1e-6, **rows) for v in (V, OTHER))
    torch.testing.assert_close(mean, X[:2] + V[:2] * (NEXT - SIGMAS)[:2, None, None], rtol=1e-9, atol=1e-9)
    assert float(gaussian_kl(mean, other, std).min()) > 1e9
    with pytest.raises(UserError, match="noise_level is 0: without noise a step is certain, and the KL .* is infinite"):
        step(sampler, V[:2], noise_level=0.0, **rows)


def test_a_sigma_of_1_needs_the_second_sigma_under_sde_only() -> None:
    first = torch.tensor([1.0, 0.6, 0.3], dtype=F64)
    with pytest.raises(UserError, match=r"sigma is 1 \(row 0\).* sigma_max="):
        step("sde", sigmas=first)
    mean, std = step("sde", sigmas=first, sigma_max=0.9)
    assert std[0].item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.4), rel=1e-13)
    assert torch.equal(mean[1:], step("sde")[0][1:])
    assert bool(step("dance_sde", sigmas=first)[0].isfinite().all())
    assert bool(cps(V[:2], X[:2], first[:2], NEXT[:2], 0.7).mean.isfinite().all())
    for value in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="sigma_max must lie strictly between 0 and 1"):
            step("sde", sigmas=first, sigma_max=value)


def test_a_last_step_has_noise_under_both_equations_and_none_under_cps() -> None:
    assert step("sde")[1][-1] > 0 and step("dance_sde")[1][-1] > 0
    with pytest.raises(UserError, match=r"next sigma is 0 \(row 2\), where sampler 'cps' adds no noise"):
        step("cps")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_float64_stays_and_everything_else_is_computed_in_fp32(kind: torch.dtype) -> None:
    mean, std = dance_sde(V.to(kind), X.to(kind), SIGMAS.to(kind), NEXT.to(kind), 0.7)
    assert mean.dtype == std.dtype == (F64 if kind == F64 else torch.float32)
    assert sde(V.to(kind), X.to(kind), SIGMAS.to(kind), NEXT.to(kind), 0.7).mean.shape == X.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": -0.1}, "noise_level must be a positive number"),
        ({"noise_level": math.nan}, "noise_level must be a positive number"),
        ({"latents": X[:2]}, r"velocity and latents must both be \[N, ...\]"),
        ({"sigmas": SIGMAS[:2]}, r"sigmas must be floats \[N\] = \(3,\)"),
        ({"next_sigmas": NEXT.long()}, "next_sigmas must be floats"),
        ({"next_sigmas": SIGMAS}, "row 0 steps from sigma 0.9 to 0.9; sigma must fall"),
        ({"sigmas": SIGMAS + 0.2}, "row 0 steps from sigma 1.1"),
        ({"next_sigmas": NEXT - 0.1}, "row 2 steps from sigma 0.3 to -0.1"),
        ({"sigmas": SIGMAS * math.nan}, "row 0 steps from sigma nan"),
    ],
    ids=["negative", "nan", "rows", "short", "whole", "still", "above 1", "below 0", "no number"],
)
def test_steps_that_are_none_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        step("dance_sde", **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_sampler_names_the_nearest_and_cps_has_a_most() -> None:
    with pytest.raises(UserError, match="did you mean 'dance_sde'"):
        step("dance_sd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at most 1"):
        step("cps", noise_level=1.1)


def test_the_kl_by_hand_and_what_it_refuses() -> None:
    means = torch.zeros(2, 2, dtype=F64), torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64)
    assert gaussian_kl(*means, 1.0).tolist() == [12.5, 0.0]
    assert gaussian_kl(*means, torch.tensor([5.0, 1.0], dtype=F64)).tolist() == [0.5, 0.0]
    assert gaussian_kl(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3), 1.0).tolist() == [3.0]
    with pytest.raises(UserError, match="both means"):
        gaussian_kl(means[0], means[1][:1], 1.0)
    with pytest.raises(UserError, match=r"std must be a number or \[N\]"):
        gaussian_kl(*means, torch.ones(3))
