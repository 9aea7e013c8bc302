"""G-OPD and ExOPD against the specification: algebra of the advantage, the target, the base's part in it."""

import math

import pytest
import torch
from torch import Tensor

from retort import registry
from retort.core.losses import TokenLosses
from retort.errors import UserError
from retort.functional import token_losses

N, V = 13, 7


def drawn(seed: int) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, BASE = drawn(0), drawn(1), drawn(2)
TOKENS = torch.arange(N) % V


def at(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, TOKENS[:, None]).squeeze(-1)


def losses(name: str = "gopd", base: Tensor = BASE, teacher: Tensor = TEACHER, **settings: object) -> TokenLosses:
    return token_losses(
        registry.load(name, **settings),
        student_logits=STUDENT,
        teacher_logits=teacher,
        tokens=TOKENS,
        extra_views={"base": base},
    )


def advantage(**settings: object) -> Tensor:
    # On-policy the ratio is 1: the surrogate's value is minus the advantage.
    return -losses(**settings).terms["reverse"].value  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.25, 1.5])
def test_the_advantage_is_the_papers(weight: float) -> None:
    expected = weight * (at(TEACHER) - at(BASE)) - (at(STUDENT) - at(BASE))
    torch.testing.assert_close(advantage(reward_weight=weight), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_of_one_is_opd_to_the_last_bit_whatever_the_base() -> None:
    plain = losses("opd").terms["reverse"].value
    banned = BASE.clone()
    banned[:, 0] = -math.inf
    for base in (BASE, banned):
        for name in ("gopd", "exopd"):
            assert torch.equal(losses(name, base, reward_weight=1.0).terms["reverse"].value, plain)
    assert "base" not in registry.load("gopd", reward_weight=1.0).views, "and nobody loads it"


def test_affine_in_the_weight() -> None:
    half, one, two = (advantage(reward_weight=weight) for weight in (0.5, 1.0, 2.0))
    torch.testing.assert_close(two - one, 2 * (one - half), rtol=1e-12, atol=1e-12)


def test_a_base_that_is_the_teacher_leaves_the_log_ratio_at_every_weight() -> None:
    for weight in (0.0, 0.7, 1.5):
        torch.testing.assert_close(
            advantage(reward_weight=weight, base=TEACHER), at(TEACHER) - at(STUDENT), rtol=1e-12, atol=1e-12
        )


def test_a_constant_on_the_base_shifts_by_one_minus_the_weight() -> None:
    from retort.core.signals import Sampled

    moved = Sampled(TOKENS, "base", at(BASE) + 0.3)
    shifted = token_losses(
        registry.load("gopd", reward_weight=1.25),
        student_logits=STUDENT,
        teacher_logits=TEACHER,
        tokens=TOKENS,
        extra_views={"base": moved},
    )
    torch.testing.assert_close(-shifted.terms["reverse"].value, advantage(reward_weight=1.25) + (1 - 1.25) * 0.3)


def test_the_engine_s_ratio_is_truncated_and_multiplies_the_advantage() -> None:
    found = token_losses(
        registry.load("gopd", truncation=1.5),
        student_logits=STUDENT,
        teacher_logits=TEACHER,
        tokens=TOKENS,
        engine_logp=torch.where(torch.arange(N) % 2 == 0, at(STUDENT) - 1.0, at(STUDENT) + 1.0),
        extra_views={"base": BASE},
    )
    expected = torch.where(torch.arange(N) % 2 == 0, 1.5, math.exp(-1.0)).double()
    torch.testing.assert_close(found.terms["reverse"].weight, expected)
    given = torch.full((N,), math.nan, dtype=torch.float64)  # answers from data
    kept = token_losses(
        registry.load("gopd"),
        student_logits=STUDENT,
        teacher_logits=TEACHER,
        tokens=TOKENS,
        engine_logp=given,
        extra_views={"base": BASE},
    )
    assert kept.terms["reverse"].weight.tolist() == [1.0] * N


@pytest.mark.parametrize(("teacher", "base", "weight", "expected"), [(0.9, 0.7, 1.5, 0.946454), (0.9, 0.7, 0.0, 0.7)])
def test_the_expected_gradient_vanishes_at_the_target(
    teacher: float, base: float, weight: float, expected: float
) -> None:
    """The golden fixed point of extrapolation_cliff.md (B3), from the library's own gradient summed over tokens."""
    logits = torch.zeros(2, dtype=torch.float64)
    two = lambda p: torch.tensor([[p, 1 - p]] * 2, dtype=torch.float64).log()  # noqa: E731
    method, tokens = registry.load("gopd", reward_weight=weight), torch.tensor([0, 1])
    for _ in range(400):
        live = logits.clone().requires_grad_()
        found = token_losses(
            method,
            student_logits=live.expand(2, 2),
            teacher_logits=two(teacher),
            tokens=tokens,
            extra_views={"base": two(base)},
        ).terms["reverse"]
        (live.softmax(-1).detach() * found.value * found.weight).sum().backward()
        logits -= 4.0 * live.grad  # type: ignore[operator]
    assert logits.softmax(-1)[0].item() == pytest.approx(expected, abs=1e-6)


def test_the_whole_softmax_has_its_fixed_point_at_the_geometric_mixture() -> None:
    """B6: at p proportional to p_T^l p_B^(1-l) the advantage is the same for every token, so nothing moves."""
    weight = 1.4
    target = weight * TEACHER.log_softmax(-1) + (1 - weight) * BASE.log_softmax(-1)
    seen = []
    for token in range(V):
        found = token_losses(
            registry.load("gopd", reward_weight=weight),
            student_logits=target,
            teacher_logits=TEACHER,
            tokens=torch.full((N,), token),
            extra_views={"base": BASE},
        )
        seen.append(found.terms["reverse"].value)
    spread = torch.stack(seen).std(0)
    assert spread.max() < 1e-12


def test_weights_that_are_not_the_methods_are_refused() -> None:
    with pytest.raises(UserError, match="at least 0"):
        registry.load("gopd", reward_weight=-0.1)
    with pytest.raises(UserError, match="below 1 it is `gopd`"):
        registry.load("exopd", reward_weight=0.9)
    with pytest.raises(UserError, match="cap of an importance ratio must be positive"):
        registry.load("gopd", truncation=0.0)


def test_defaults_are_the_released_scripts() -> None:
    for name in ("gopd", "exopd"):
        found = registry.defaults(name)
        assert (found["reward_weight"], found["truncation"], found["samples"]) == (1.25, 5.0, 1)


def test_asks_both_models_for_the_token_written_and_no_more() -> None:
    method = registry.load("exopd")
    assert {view: [str(need) for need in method.needs(view)] for view in method.views} == {
        "teacher": ["log-prob of the sampled token"],
        "base": ["log-prob of the sampled token"],
    }
    with pytest.raises(UserError, match="needs a signal for view 'base'"):
        token_losses(method, student_logits=STUDENT, teacher_logits=TEACHER, tokens=TOKENS)
