"""The units of a step's rollouts as one column, and the metrics by kind of unit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from trained import trained

from retort.align.pieces import shown_pieces
from retort.core.rollouts import Message, Pack, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.core.signals import Spans, unit_columns
from retort.core.steps import Clock
from retort.registry import load
from retort.train.learning.passes import Batch
from retort.train.output.units import single_steps, unit_metrics

NAN = math.nan
SIZES = torch.tensor([1.0, 1.0, 0.0, 2.0, NAN, 1.0])
SINGLE = [True, False, False, False, False, True]
SPANS = [False, True, True, True, False, False]


def test_the_column_of_a_signal() -> None:
    units = [
        (slice(0, 1), slice(0, 1)),
        (slice(1, 3), slice(1, 2)),
        (slice(3, 4), slice(2, 4)),
        (slice(5, 6), slice(5, 6)),
    ]
    tokens_N, tokens_M, none = torch.arange(6), torch.arange(6), torch.zeros(0).long()
    columns, _ = unit_columns(units, tokens_N, tokens_M, -torch.ones(6), (none, none))
    signal = Spans(tokens_N, "teacher", lambda rows: torch.zeros(len(tokens_N[rows]), 6), 6, **cast(Any, columns))
    torch.testing.assert_close(signal.rows(slice(0, 6)).units.sizes_C, SIZES, equal_nan=True)
    # A block begins with a unit, or outside of all.
    torch.testing.assert_close(signal.rows(slice(3, 6)).units.sizes_C, SIZES[3:], equal_nan=True)


def test_units_of_one_token_on_each_side_and_longer_ones() -> None:
    assert [kind.tolist() for kind in single_steps(SIZES)] == [SINGLE, SPANS]
    assert [kind.tolist() for kind in single_steps(torch.full((2,), NAN))] == [[False] * 2] * 2


def scored(status: Status, sizes_N: torch.Tensor = SIZES) -> dict[str, float]:
    """The metrics of two completions of three tokens, of which the second ends as given."""
    prompt = Prompt("a", (Message("user", "a"),))
    sequence = TokenSequence.of([0]).then([1, 2, 3], decided=True)
    rollouts = [Rollout(prompt, sequence, status=Status.TRUNCATED), Rollout(prompt, sequence, member=1, status=status)]
    pack = Pack.of(rollouts)
    batch = Batch(load("simct", stop_coef=0.5), pack, pack.steps, {}, Clock())
    object.__setattr__(batch, "valid", {"teacher": ~sizes_N.isnan()})
    values = {
        "teacher_units": sizes_N,
        "divergence.value": torch.tensor([1.0, 2.0, 0.0, 4.0, 100.0, 3.0]),
        "divergence.weight": torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 1.0]),
        "stop.value": torch.zeros(6),
        "stop.weight": torch.ones(6),
        "student_logp": torch.full((6,), 0.25).log(),
        "teacher_logp": torch.full((6,), 0.5).log(),
    }
    return unit_metrics(batch, values)


def test_metrics_by_kind_of_unit() -> None:
    found = scored(Status.COMPLETED)
    assert found["unit_loss/divergence/one_to_one"] == pytest.approx((1.0 + 3.0) / 2)
    assert found["unit_loss/divergence/spans"] == pytest.approx((2.0 + 0.0 + 2.0) / 3)
    assert (found["stop_probability/student"], found["stop_probability/teacher"]) == pytest.approx((0.25, 0.5))


def test_what_was_not_measured_is_left_out() -> None:
    assert not [name for name in scored(Status.TRUNCATED) if name.startswith("stop")]
    # The second completion's end is in no unit: the teacher did not read it.
    unread = torch.tensor([1.0, 1.0, 1.0, NAN, NAN, NAN])
    assert scored(Status.COMPLETED, unread).keys() == {"unit_loss/divergence/one_to_one", "unit_loss/stop/one_to_one"}
    batch = cast(Any, SimpleNamespace(method=load("simct")))
    assert unit_metrics(batch, {"student_logp": SIZES, "teacher_logp": SIZES}) == {}, "one tokenizer has none of it"


def test_pieces_are_shown_as_one_reads_them() -> None:
    tokenizer = trained("gemma")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁", "t", "<0xF0>", "</s>")]
    assert shown_pieces(tokenizer, ids) == [" ", "t", "\\xf0", "</s>"]
