"""W2S-OPD: its target against the formula, its ties to ExOPD and to the exact reverse KL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import retort
from retort.core.losses import TokenLosses
from retort.errors import UserError
from retort.functional import token_losses

F64 = torch.float64
VOCAB = 7
NAMES = ("base", "teacher", "teacher_minus", "teacher_2", "teacher_2_minus")


def drawn(seed: int) -> Tensor:
    return 1.5 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=F64)


STUDENT = drawn(0)
MODELS = {name: drawn(1 + place) for place, name in enumerate(NAMES)}


def losses(student: Tensor = STUDENT, models: dict[str, Tensor] | None = None, **settings: Any) -> TokenLosses:
    method = retort.load("w2s_opd", **settings)
    views = {**MODELS, **(models or {})}
    return token_losses(
        method,
        student_logits=student,
        teacher_logits=views["teacher"],
        tokens=torch.tensor([0]),
        extra_views={name: views[name] for name in method.views if name != "teacher"},
    )


def kl(student: Tensor, target: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), target.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("pairs", [1, 2])
def test_value_and_gradient_are_those_of_the_formula(alpha: float, pairs: int) -> None:
    live, other = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    target = MODELS["base"] + alpha * (MODELS["teacher"] - MODELS["teacher_minus"])
    if pairs == 2:
        target = target + alpha * (MODELS["teacher_2"] - MODELS["teacher_2_minus"])
    found, wanted = losses(live, alpha=alpha, pairs=pairs).loss, kl(other, target)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(found, live)[0], torch.autograd.grad(wanted, other)[0], rtol=1e-12, atol=1e-13
    )


def test_golden_number() -> None:
    """Odds of (6/4) / (4/6): the target of an even base is (9, 4) / 13."""
    two = {name: torch.tensor([[p, 1 - p]], dtype=F64).log() for name, p in
           (("base", 0.5), ("teacher", 0.6), ("teacher_minus", 0.4))}  # fmt: skip
    found = losses(two["base"], two).loss.item()
    assert found == pytest.approx(0.5 * math.log(0.5 * 13 / 9) + 0.5 * math.log(0.5 * 13 / 4), abs=1e-14)


def test_nothing_is_learnt_without_a_difference() -> None:
    for settings, models in (({"alpha": 0.0}, {}), ({}, {"teacher_minus": MODELS["teacher"]})):
        live = MODELS["base"].clone().requires_grad_()
        found = losses(live, models, **settings)
        assert found.loss.abs().item() < 1e-14
        assert torch.autograd.grad(found.loss, live)[0].abs().max() < 1e-14


def test_with_the_base_as_worse_model_it_is_what_exopd_samples() -> None:
    """The mean over the student's tokens of ExOPD's gradient is that of this divergence."""
    every = torch.arange(VOCAB)
    logits = STUDENT.expand(VOCAB, VOCAB).clone().requires_grad_()
    exopd = token_losses(
        retort.load("exopd", reward_weight=1.5, clip=None, truncation=None),
        student_logits=logits,
        teacher_logits=MODELS["teacher"].expand(VOCAB, VOCAB),
        tokens=every,
        extra_views={"base": MODELS["base"].expand(VOCAB, VOCAB)},
    )
    (sampled,) = torch.autograd.grad(exopd.terms["reverse"].value.sum(), logits)
    live = STUDENT.clone().requires_grad_()
    (exact,) = torch.autograd.grad(losses(live, minus="base", alpha=1.5).loss, live)
    torch.testing.assert_close(STUDENT.softmax(-1) @ sampled, exact, rtol=1e-11, atol=1e-13)


def test_ids_that_models_rule_out() -> None:
    """Of base and better model they stay out; what only the worse one rules out is left as the base has it."""
    for name in ("base", "teacher"):
        banned = MODELS[name].clone()
        banned[0, 0] = -math.inf
        assert losses(models={name: banned}).loss == math.inf
    banned = MODELS["teacher_minus"].clone()
    banned[0, 0] = -math.inf
    live = STUDENT.clone().requires_grad_()
    found = losses(live, {"teacher_minus": banned})
    assert found.loss.isfinite()
    assert torch.autograd.grad(found.loss, live)[0].isfinite().all()


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"pairs": 2, "minus": "base"}])
def test_pairs_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="method.pairs must be at least 1"):
        retort.load("w2s_opd", **settings)
