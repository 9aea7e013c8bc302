"""A teacher's agreement with a verdict: by hand, its bounds, and that it never turns a verdict round."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.advantages.outcome import group_advantage, stored_advantage
from retort.core.context import Context
from retort.core.parts import Stat
from retort.core.signals import Sampled
from retort.core.steps import Clock
from retort.errors import UserError
from retort.quantities import outside_bound
from retort.weights import directed_ratio
from retort.weights.directed import directed


def context(delta: list[float], advantage: list[float], step: int = 0) -> Context:
    count = len(delta)
    # So unlikely a token that no ratio makes the teacher's log-prob of it positive.
    student = torch.tensor([[0.0, 100.0]] * count, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(count, dtype=torch.long)
    teacher = student.detach().log_softmax(-1)[:, 0] + torch.tensor(delta, dtype=torch.float64)
    return Context.from_logits(
        student,
        tokens,
        {"teacher": Sampled(tokens, "teacher", teacher).rows(slice(None))},
        {"a": torch.tensor(advantage, dtype=torch.float64)},
        clock=Clock(step),
    )


ADVANTAGE = stored_advantage(Stat("a", None, lambda values_N, *_: values_N))


def test_by_hand() -> None:
    delta = [0.1, 0.1, 1.0, 1.0, -0.1, 0.3, -math.inf, -math.inf, -math.inf]
    sign = [2.0, -2.0, 0.5, -0.5, 3.0, 0.0, 1.0, -1.0, 0.0]
    found = directed_ratio(ADVANTAGE, share=1.0).value(context(delta, sign), "teacher")
    wanted = [math.exp(0.1), math.exp(-0.1), 1.2, 0.8, math.exp(-0.1), 1.0, 0.8, 1.2, 1.0]
    assert found.tolist() == pytest.approx(wanted)
    half = directed_ratio(ADVANTAGE, share=0.5).value(context(delta, sign), "teacher")
    assert half.tolist() == pytest.approx([0.5 + 0.5 * w for w in wanted])
    negative = directed_ratio(ADVANTAGE, negative_only=True).value(context(delta, sign), "teacher")
    assert negative.tolist() == pytest.approx([1.0 if a > 0 else w for a, w in zip(sign, wanted, strict=True)])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.floats(0, 1),
    st.floats(0, 0.99),
)
def test_it_stays_in_its_range_and_never_turns_a_verdict(
    delta: list[float], advantage: list[float], share: float, bound: float
) -> None:
    weight = directed_ratio(ADVANTAGE, share=share, bound=bound).value(context(delta, advantage), "teacher")
    assert ((weight >= 1 - share * bound - 1e-12) & (weight <= 1 + share * bound + 1e-12)).all()
    assert (weight > 0).all()


def test_the_teachers_preference_works_the_way_of_the_verdict() -> None:
    up, down = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])
    delta = torch.tensor([0.05, 0.15])
    assert directed(delta, up, 0.2).diff() > 0
    assert directed(delta, down, 0.2).diff() < 0


def test_what_is_cut_off() -> None:
    here = context([0.5, -0.5, 0.1, -0.5], [1.0, 1.0, 1.0, -1.0])
    assert outside_bound(ADVANTAGE, 0.2, "low").value(here, "teacher").tolist() == [0.0, 1.0, 0.0, 0.0]
    assert outside_bound(ADVANTAGE, 0.2, "high").value(here, "teacher").tolist() == [1.0, 0.0, 0.0, 1.0]


def test_no_gradient_and_the_share_follows_its_schedule() -> None:
    falling = directed_ratio(ADVANTAGE, share=lambda step, _: 1.0 - step / 10)
    assert falling.value(context([1.0], [1.0], step=4), "teacher").item() == pytest.approx(1.0 + 0.6 * 0.2)
    assert not falling.value(context([1.0], [1.0]), "teacher").requires_grad


def test_bad_settings() -> None:
    for given_ in ({"bound": 1.0}, {"bound": -0.1}, {"share": 1.1}):
        with pytest.raises(UserError, match="must lie in"):
            directed_ratio(group_advantage(), **given_)
