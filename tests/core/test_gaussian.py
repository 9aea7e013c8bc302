"""The Gaussian over next latents: as a policy, and as what a teacher says about each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.gaussian import Gaussian as Policy
from retort.core.needs import DENSE, GAUSSIAN, POLICY, PROBABILITY, SAMPLED, can_meet
from retort.core.policy import Policy as Base
from retort.core.signals import Gaussian
from retort.core.steps import NO_TOKEN, Steps
from retort.errors import SignalError

F64 = torch.float64
DRAW = torch.Generator().manual_seed(0)
MEAN, OTHER, DECIDED = (torch.randn(4, 3, generator=DRAW, dtype=F64) for _ in range(3))
STD, WIDER = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=F64), torch.tensor([0.7, 1.0, 1.5, 0.2], dtype=F64)


def per_step(mean: Tensor, std: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(mean, std[:, None]), 1)


def test_a_gaussian_says_what_torch_says_of_it() -> None:
    ours, theirs = Policy(MEAN, STD), Policy(OTHER, WIDER)
    p, q = per_step(MEAN, STD), per_step(OTHER, WIDER)
    torch.testing.assert_close(ours.logp_of(DECIDED), p.log_prob(DECIDED), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.entropy(), p.entropy(), rtol=1e-13, atol=1e-13)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(ours.reverse_kl(theirs), kl(p, q), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.forward_kl(theirs), kl(q, p), rtol=1e-12, atol=1e-13)


def test_the_same_policy_is_exactly_nothing_away() -> None:
    assert torch.equal(Policy(MEAN, STD).reverse_kl(Policy(MEAN, STD)), torch.zeros(4, dtype=F64))


def test_at_one_deviation_both_directions_are_the_same_number() -> None:
    ours, theirs = Policy(MEAN, STD), Policy(OTHER, STD)
    by_hand = (MEAN - OTHER).square().sum(-1) / (2 * STD.square())
    torch.testing.assert_close(ours.reverse_kl(theirs), by_hand, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(ours.forward_kl(theirs), by_hand, rtol=1e-14, atol=0.0)


def test_the_log_ratio_of_a_large_fp32_latent_keeps_its_digits() -> None:
    """Each log-density is some 60,000 nats; their difference, about 1, is what is learnt from."""
    draw = torch.Generator().manual_seed(1)
    mean, noise, apart = (torch.randn(1, 65536, generator=draw, dtype=F64) for _ in range(3))
    std = torch.tensor([0.3], dtype=F64)
    other, decided = mean + 0.001 * apart, mean + 0.3 * noise

    def ratio(kind: torch.dtype) -> float:
        point, small = decided.to(kind), std.to(kind)
        return float(Policy(other.to(kind), small).logp_of(point) - Policy(mean.to(kind), small).logp_of(point))

    assert abs(Policy(mean, std).logp_of(decided).item()) > 10_000
    assert ratio(torch.float32) == pytest.approx(ratio(F64), abs=2e-3)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (MEAN, STD * 0, "deviation is 0: without noise a step is certain, and the KL .* is infinite .step 0"),
        (MEAN, -STD, "deviation is negative"),
        (MEAN, STD / 0, "deviation is not finite"),
        (MEAN * math.nan, STD, "mean is not finite"),
        (MEAN / 0, STD, "mean is not finite"),
        (MEAN, STD[:2], r"\[N, D\] and \[N\], not \(4, 3\) and \(2,\)"),
        (MEAN[:, 0], STD, r"\[N, D\] and \[N\]"),
        (MEAN.long(), STD, "must be floats"),
    ],
    ids=["certain", "negative", "infinite", "nan", "infinite mean", "short", "flat", "whole"],
)
def test_what_is_no_gaussian_is_refused(mean: Tensor, std: Tensor, message: str) -> None:
    with pytest.raises(SignalError, match=message) as caught:
        Policy(mean, std, "t")
    assert str(caught.value).startswith("t: ")
    decided = torch.zeros(mean.shape)
    makes: list[Callable[[], object]] = [lambda: Gaussian.of(mean, std, decided, source="t")]
    for make in makes:
        with pytest.raises(SignalError, match=message if len(std) == len(mean) else "2 steps"):
            make()


def test_the_signal_is_detached_and_cut_by_rows() -> None:
    live = MEAN.clone().requires_grad_()
    signal = Gaussian.of(live, STD, DECIDED, source="t")
    assert not signal.mean_ND.requires_grad
    whole = signal.rows(slice(None)).sampled_logp_N
    torch.testing.assert_close(whole, per_step(MEAN, STD).log_prob(DECIDED))
    index = torch.tensor([3, 1])
    assert torch.equal(signal.select(index).rows(slice(None)).sampled_logp_N, whole[index])
    assert torch.equal(signal.rows(slice(1, 3)).sampled_logp_N, whole[1:3])
    assert torch.equal(signal.tokens_N, torch.full((4,), NO_TOKEN))


def test_a_step_without_context_may_hold_anything_and_is_left_out() -> None:
    valid = torch.tensor([True, False, True, True])
    mean, std = MEAN.clone(), STD.clone()
    mean[1], std[1] = math.nan, 0.0
    signal = Gaussian.of(mean, std, DECIDED, valid_N=valid)
    assert bool(signal.rows(slice(None)).sampled_logp_N.isfinite().all())
    kept = signal.select(torch.tensor([0, 1]))
    assert kept.valid_N is not None and kept.valid_N.tolist() == [True, False]
    with pytest.raises(SignalError, match="mean is not finite"):
        replace(signal, valid_N=None)
    with pytest.raises(SignalError, match=r"valid_N must be bool \[N\]"):
        Gaussian.of(MEAN, STD, DECIDED, valid_N=torch.tensor([1, 0, 1, 1]))


def test_a_signal_about_other_latents_is_refused() -> None:
    signal = Gaussian.of(MEAN, STD, DECIDED, source="expert")
    signal.check_decided(DECIDED)
    other = DECIDED.clone()
    other[2, 1] += 1e-9
    with pytest.raises(SignalError, match="expert: misaligned at step 2"):
        signal.check_decided(other)
    with pytest.raises(SignalError, match="expert: scored latents"):
        signal.check_decided(DECIDED[:2])
    with pytest.raises(SignalError, match="different shapes"):
        Gaussian.of(MEAN, STD, DECIDED[:, :2])


def test_which_needs_a_gaussian_meets() -> None:
    offers = Gaussian.of(MEAN, STD, DECIDED).offers
    assert all(can_meet(offers, need) for need in (SAMPLED, GAUSSIAN, POLICY))
    assert not any(can_meet(offers, need) for need in (DENSE, PROBABILITY))
    assert not can_meet({"dense"}, GAUSSIAN) and can_meet({"dense"}, POLICY)


def test_a_context_of_latents_has_no_vocabulary_and_says_so() -> None:
    signal = Gaussian.of(OTHER, STD, DECIDED).rows(slice(None))
    steps = Steps.of(torch.full((4,), NO_TOKEN))
    context = Context(Policy(MEAN, STD), {"teacher": signal}, steps, latents_ND=DECIDED)
    torch.testing.assert_close(context.student_logp_N, per_step(MEAN, STD).log_prob(DECIDED))
    torch.testing.assert_close(context.student_entropy_N, per_step(MEAN, STD).entropy())
    with pytest.raises(SignalError, match="a denoising step decides no token"):
        _ = context.student
    with pytest.raises(SignalError, match="no full distribution"):
        _ = signal.distribution


def test_a_distribution_is_a_policy_to_the_bit() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()
    tokens = torch.tensor([0, 6, 3, 3, 1])
    policy = Distribution(logits)
    assert torch.equal(policy.logp_of(tokens), policy.logp_at(tokens[:, None]).squeeze(-1))
    assert policy.offers == {"dense"}
    with pytest.raises(SignalError, match="nothing compares a Gaussian over latents with a Distribution"):
        Policy(MEAN, STD).reverse_kl(policy)
    with pytest.raises(SignalError, match="not available"):
        Base().logp_of(tokens)
