"""Methods on denoising steps, in float64: one algebra for tokens and for latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flows.batch import F64, NOISE, SAMPLERS, Flow, velocity
from torch import Tensor

from retort import registry
from retort.divergences import gaussian_kl, jsd, reverse_kl
from retort.errors import SignalError, UserError
from retort.estimators import pathwise
from retort.flows import Sampler, denoising_step
from retort.method import Method, Term
from retort.methods.flow_opd import flow_opd
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights import above

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def true_kl(flow: Flow, weights: Tensor, other: Tensor) -> Tensor:
    """The KL of each step, [N], from the definition of torch's own distributions."""
    found: list[torch.distributions.Distribution] = []
    for own in (weights, other):
        mean, std_N = denoising_step(
            flow.sampler, velocity(own, flow.latents), flow.latents, flow.sigmas, flow.next_sigmas, NOISE
        )
        normal = torch.distributions.Normal(mean, std_N[:, None, None].expand_as(mean))
        found.append(torch.distributions.Independent(normal, 2))
    return torch.distributions.kl_divergence(*found)


@each_sampler
@pytest.mark.parametrize("name", ["flow_opd", "diffusion_opd"])
def test_the_value_is_the_true_kl_and_the_gradient_that_of_autograd(sampler: Sampler, name: str) -> None:
    flow = Flow(sampler)
    losses = flow.losses(name)
    by_definition = true_kl(flow, flow.weights, flow.others["teacher"].detach())
    assert list(losses.terms) == ["distillation"]
    torch.testing.assert_close(losses.terms["distillation"].value, by_definition, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(losses.loss, by_definition.mean(), rtol=1e-11, atol=1e-12)
    by_autograd = torch.autograd.grad(by_definition.mean(), flow.weights)[0]
    torch.testing.assert_close(flow.gradient(losses), by_autograd, rtol=1e-10, atol=1e-11)


@each_sampler
def test_monte_carlo_agrees_with_the_closed_form(sampler: Sampler) -> None:
    """The mean of log p_S - log p_T over the student's own next latents is the KL: 40,000 of them for one step."""
    draws = 40_000
    flow = Flow(sampler)
    latents = flow.latents[1:2].expand(draws, -1, -1)
    sigmas, then = flow.sigmas[1:2].expand(draws), flow.next_sigmas[1:2].expand(draws)
    given: dict[str, Any] = {
        "student_velocity": velocity(flow.weights, latents),
        "teacher_velocity": velocity(flow.others["teacher"], latents),
        "latents": latents,
        "next_latents": flow.decide(latents, sigmas, then),
        "sigmas": sigmas,
        "next_sigmas": then,
        **dict.fromkeys(("rollouts", "groups", "rewards", "extra_views")),
    }
    sampled = flow.losses("opd", **given).terms["reverse"].value.detach()  # the log-ratio, with its sign turned
    exact = float(flow.losses("flow_opd", **given).terms["distillation"].value[0].detach())
    error = float(sampled.std()) / math.sqrt(draws)
    assert exact > 20 * error, "too few draws to say anything"
    assert float(sampled.mean()) == pytest.approx(exact, abs=4 * error)


@each_sampler
def test_equal_velocities_are_exactly_nothing_apart(sampler: Sampler) -> None:
    flow = Flow(sampler)
    for method in ("flow_opd", "diffusion_opd", "opd", registry.load("gkd", divergence="reverse_kl")):
        losses = flow.losses(method, same=True)
        assert losses.loss.item() == 0.0
        assert bool((flow.gradient(losses) == 0).all())


def _means(flow: Flow, gradient: str, repeats: int) -> tuple[Tensor, Tensor]:
    """Mean over fresh next latents of the gradient, and its standard error, per weight."""
    count = len(flow.latents)
    rows = torch.arange(count).repeat(repeats)
    latents, sigmas, then = flow.latents[rows], flow.sigmas[rows], flow.next_sigmas[rows]
    weights = flow.weights.detach().expand(repeats, 6, 6).clone().requires_grad_()
    moved = torch.einsum("rij,rnj->rni", weights, latents.reshape(repeats, count, 6)).reshape(latents.shape)
    losses = flow.losses(
        flow_opd(gradient=gradient),  # type: ignore[arg-type]
        student_velocity=moved,
        teacher_velocity=velocity(flow.others["teacher"], latents),
        latents=latents,
        next_latents=flow.decide(latents, sigmas, then),
        sigmas=sigmas,
        next_sigmas=then,
        **dict.fromkeys(("rollouts", "groups", "rewards", "extra_views")),
    )
    found = torch.autograd.grad(losses.loss, weights)[0] * repeats
    return found.mean(0), found.std(0) / math.sqrt(repeats)


def test_which_policy_gradients_have_a_direction() -> None:
    """The log-ratio of the sampled latent has the direct gradient on average; the detached KL, as printed, has none."""
    flow = Flow("sde", trajectories=2, apart=0.05)
    direct, _ = _means(flow, "direct_kl", 2)
    size = float(direct.norm())

    sampled, error = _means(flow, "sampled_log_ratio", 20_000)
    assert float((sampled - direct).norm()) < 3 * float(error.norm()) < 0.1 * size
    detached, error = _means(flow, "paper_detached", 20_000)
    assert float(detached.norm()) < 3 * float(error.norm()) < 0.3 * size
    along = float((detached * direct).sum()) / size**2
    assert abs(along) < 0.05, "the detached form moves along the gradient after all"


def test_the_detached_form_shows_the_same_value_as_the_direct_one() -> None:
    flow = Flow()
    values = [
        flow.losses(flow_opd(gradient=one)).terms["distillation"].value for one in ("direct_kl", "paper_detached")
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


def test_the_scale_is_a_factor_of_the_loss_and_not_of_the_value() -> None:
    flow = Flow()
    plain, scaled = flow.losses("flow_opd"), flow.losses(flow_opd(scale=0.25))
    torch.testing.assert_close(scaled.loss, 0.25 * plain.loss, rtol=1e-14, atol=0.0)
    assert torch.equal(scaled.terms["distillation"].value, plain.terms["distillation"].value)


def test_an_anchor_adds_its_own_kl_and_the_same_teacher_twice_adds_up() -> None:
    flow = Flow()
    both = flow.losses(flow_opd(anchor_coef=0.5))
    to_anchor = true_kl(flow, flow.weights, flow.others["anchor"]).detach()
    torch.testing.assert_close(both.terms["anchor"].value.detach(), to_anchor, rtol=1e-11, atol=1e-12)
    plain = flow.losses("flow_opd")
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * to_anchor.mean(), rtol=1e-11, atol=1e-12)
    teacher = velocity(flow.others["teacher"], flow.latents)
    twice = flow.losses(flow_opd(anchor_coef=0.5), extra_views={"anchor": teacher})
    torch.testing.assert_close(twice.loss, 1.5 * plain.loss, rtol=1e-13, atol=0.0)
    with pytest.raises(UserError, match="needs a signal for view 'anchor'"):
        flow.losses(flow_opd(anchor_coef=0.5), extra_views=None)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (registry.load("eopd"), "entropy .that of a step is its noise's, .* and its top-16 from a teacher"),
        (registry.load("gkd"), "of two Gaussians, only the forward and the reverse KL have a closed form"),
        (registry.load("topk_kl"), "log-probs of the student's top-16 from a teacher"),
        (registry.load("power_opd"), "the probability of what was decided .a latent has a density. of the student"),
        (registry.load("opd", temperature=0.7), "a temperature of 0.7"),
        (
            Method(
                rollout=RolloutPlan(),
                terms=(Term("gated", pathwise(reverse_kl()), weight=above(student_entropy(), 0.5)),),
            ),
            "entropy .* of the student",
        ),
        # The need of one part, equal to that of another which has a form for Gaussians, is not hidden by it.
        (
            Method(rollout=RolloutPlan(), terms=(Term("one", pathwise(reverse_kl())), Term("two", pathwise(jsd())))),
            "the whole distribution",
        ),
    ],
    ids=["gate", "jsd", "top-k", "probability", "temperature", "student's entropy", "two terms"],
)
def test_what_needs_a_vocabulary_is_refused_with_the_reason(method: Method, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        Flow().losses(method)
    assert "methods that can: " in str(caught.value) and "\n" not in str(caught.value)


def test_the_baseline_of_vopd_is_the_closed_form() -> None:
    """Sample minus mean: its value averages to nothing, and a pathwise KL is what is taken off."""
    flow = Flow()
    losses = flow.losses(registry.load("vopd", top_k=None))
    plain, kl = flow.losses("opd").terms["reverse"].value, flow.losses("flow_opd").terms["distillation"].value
    torch.testing.assert_close(losses.terms["reverse"].value, plain - kl, rtol=1e-11, atol=1e-11)


def test_an_importance_ratio_is_against_the_densities_before_the_update() -> None:
    flow = Flow()
    at_first = flow.losses("opd")
    fresh = flow.losses("opd", old_logp=_logp(flow))
    torch.testing.assert_close(fresh.loss, at_first.loss, rtol=1e-12, atol=1e-12)
    moved = flow.losses("opd", old_logp=_logp(flow) - math.log(2.0)).terms["reverse"].value
    ratio = at_first.terms["reverse"].value
    torch.testing.assert_close(moved, 2 * (ratio - math.log(2.0)), rtol=1e-11, atol=1e-11)


def _logp(flow: Flow) -> Tensor:
    mean, std_N = denoising_step(
        flow.sampler, velocity(flow.weights, flow.latents), flow.latents, flow.sigmas, flow.next_sigmas, NOISE
    )
    return torch.distributions.Normal(mean, std_N[:, None, None]).log_prob(flow.next_latents).sum((1, 2)).detach()


@each_sampler
def test_a_mean_form_of_the_callers_own_gives_the_same(sampler: Sampler) -> None:
    flow = Flow(sampler)
    of = [velocity(own, flow.latents) for own in (flow.weights, flow.others["teacher"])]
    (mean, std), (other, _) = (
        denoising_step(sampler, v, flow.latents, flow.sigmas, flow.next_sigmas, NOISE) for v in of
    )
    value = flow.losses("diffusion_opd").terms["distillation"].value
    torch.testing.assert_close(value, gaussian_kl(mean, other, std), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_smaller_floats_are_computed_in_fp32(kind: torch.dtype) -> None:
    flow = Flow()
    student = velocity(flow.weights, flow.latents).detach().to(kind).requires_grad_()
    losses = flow.losses("flow_opd", student_velocity=student, latents=flow.latents.to(kind))
    gradient = torch.autograd.grad(losses.loss, student)[0]
    assert gradient.dtype == kind and bool(gradient.isfinite().all())
    exact = flow.losses("flow_opd").loss.item()
    assert losses.loss.item() == pytest.approx(exact, rel=1e-5 if kind == torch.float32 else 0.2)
    assert flow.losses("flow_opd").loss.dtype == F64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher_velocity": None}, UserError, "needs a signal for view 'teacher', which was not given"),
        ({"next_latents": torch.zeros(2, 2, 3)}, UserError, "next_latents must be"),
        ({"teacher_velocity": torch.zeros(2, 2, 3)}, UserError, "velocity and latents must both be"),
        ({"rollouts": torch.zeros(3, dtype=torch.long)}, UserError, r"rollouts must be \[N\]"),
        ({"teacher_velocity": torch.full((20, 2, 3), math.nan)}, SignalError, "teacher: the mean is not finite"),
        ({"student_velocity": torch.full((20, 2, 3), math.inf)}, SignalError, "student: the mean is not finite"),
        ({"noise_level": 0.0}, UserError, "noise_level is 0"),
        ({"sampler": "euler"}, UserError, "unknown sampler 'euler'"),
    ],
    ids=["no teacher", "next", "teacher's shape", "rollouts", "nan", "inf", "no noise", "sampler"],
)
def test_inputs_that_do_not_fit_are_one_line(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Flow().losses("flow_opd", **changes)
    assert "\n" not in str(caught.value)
