"""The gate by a teacher's entropy: by hand, its bounds, the window, the scale of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.core.context import Context
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.weights import Confidence
from retort.weights.confidence import lowest_ahead


def gate(
    entropy: list[float] | Tensor, rollouts: list[int] | None = None, gamma: float = 0.3, **more: object
) -> tuple[Tensor, Tensor]:
    """The weights, and what of them is owed to the window."""
    confidence = Confidence(gamma, **more)  # type: ignore[arg-type]
    entropy_N = torch.as_tensor(entropy, dtype=torch.float64)
    tokens = torch.zeros(len(entropy_N), dtype=torch.long)
    steps = Steps.of(tokens, tokens if rollouts is None else torch.tensor(rollouts))
    stored = {stat.name: stat.finish(entropy_N, steps, Clock()) for stat in confidence.stats}
    student = torch.zeros(len(entropy_N), 2, dtype=torch.float64)
    context = Context.from_logits(student, torch.zeros(len(entropy_N), dtype=torch.long), {}, stored)
    return confidence.weight().value(context, "teacher"), confidence.restored().value(context, "teacher")


def test_by_hand() -> None:
    assert gate([0.0, 1.0, 2.0, 4.0])[0].tolist() == pytest.approx([1.0, 0.925, 0.85, 0.7])
    assert gate([0.0, 1.0, 2.0, 4.0], gamma=1.0)[0].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.1])
    assert gate([0.0, 4.0], gamma=1.0, floor=0.0)[0].tolist() == [1.0, 0.0]


def test_a_sure_batch_is_hardly_weighed_and_an_unsure_one_only_by_ratios() -> None:
    assert gate([0.2, 0.4])[0].tolist() == pytest.approx([0.94, 0.88])  # over one nat, not over 0.4
    entropy = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    torch.testing.assert_close(gate(entropy)[0], gate(3.0 * entropy)[0])


def test_the_window_by_hand() -> None:
    entropy, rollouts = [3.0, 0.3, 2.0, 1.0, 4.0, 5.0], [0, 0, 0, 1, 1, 1]
    least = lowest_ahead(torch.tensor(entropy), torch.tensor(rollouts), 1)
    assert least.tolist() == pytest.approx([0.3, 0.3, 2.0, 1.0, 4.0, 5.0])
    assert lowest_ahead(torch.tensor(entropy), torch.tensor(rollouts), 99).tolist() == pytest.approx(
        [0.3, 0.3, 2.0, 1.0, 4.0, 5.0]
    )
    mixed = lowest_ahead(torch.tensor([3.0, 1.0, 0.3, 4.0, 2.0, 5.0]), torch.tensor([7, 2, 7, 2, 7, 2]), 1)
    assert mixed.tolist() == pytest.approx([0.3, 1.0, 0.3, 4.0, 2.0, 5.0])
    assert torch.equal(lowest_ahead(torch.tensor(entropy), torch.tensor(rollouts), 0), torch.tensor(entropy))


def test_whose_largest_divides() -> None:
    entropy = [2.0, 10.0, 4.0]
    assert gate(entropy, window=1, gamma=0.5)[0].tolist() == pytest.approx([0.9, 0.8, 0.8])
    assert gate(entropy, window=1, gamma=0.5, scale="smoothed")[0].tolist() == pytest.approx([0.75, 0.5, 0.5])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=12), st.floats(0, 1.5), st.integers(0, 6))
def test_bounds_and_what_the_window_gives_back(entropy: list[float], gamma: float, window: int) -> None:
    weight, restored = gate(entropy, gamma=gamma, window=window)
    plain, none = gate(entropy, gamma=gamma)
    assert ((weight >= max(0.1, 1 - gamma) - 1e-12) & (weight <= 1.0)).all()
    assert (weight >= plain).all()
    torch.testing.assert_close(restored, weight - plain)
    assert not none.any()


def test_where_entropies_do_not_change_the_window_changes_nothing() -> None:
    entropy, rollouts = [2.0] * 4 + [3.0] * 3, [0] * 4 + [1] * 3
    assert torch.equal(gate(entropy, rollouts, window=3)[0], gate(entropy, rollouts)[0])


def test_the_line_lies_above_the_optimal_weight_and_meets_it_at_the_ends() -> None:
    # With noise growing with entropy, the best weight is 1 / (1 + a H); gamma = NSR / (1 + NSR) gives a = NSR.
    ratio = 3.0 / 7.0
    normal = torch.linspace(0, 1, 11, dtype=torch.float64)
    weight = gate(5.0 * normal, gamma=ratio / (1 + ratio))[0]
    best = 1.0 / (1.0 + ratio * normal)
    assert (weight >= best - 1e-12).all()
    assert weight[[0, -1]].tolist() == pytest.approx(best[[0, -1]].tolist())


def test_nothing_to_weigh() -> None:
    assert gate([])[0].tolist() == []


def test_bad_settings() -> None:
    for given_, message in (
        ({"coef": -0.1}, "coef"),
        ({"coef": 0.3, "floor": 1.1}, "floor"),
        ({"coef": 0.3, "window": -1}, "window"),
    ):
        with pytest.raises(UserError, match=message):
            Confidence(**given_)  # type: ignore[arg-type]
