"""Policy gradients are weighed by the trainer's probability over the engine's where another program writes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from retort import load
from retort.functional import token_losses
from retort.methods._engine import corrected_for_engine

STUDENT = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]).log()
TEACHER = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2]]).log()
TOKENS = torch.tensor([0, 0, 0])
ENGINE = torch.tensor([0.5, 0.4, 0.1]).log()


def test_the_weight_is_the_ratio_at_most_two() -> None:
    """Loss of opd at a step: -(ln 0.8 - ln 0.5); weights 1, 0.5 / 0.4, and 2 for 0.5 / 0.1."""
    method = corrected_for_engine(load("opd"))
    given: dict[str, Any] = {
        "student_logits": STUDENT,
        "teacher_logits": TEACHER,
        "tokens": TOKENS,
        "engine_logp": ENGINE,
    }
    found, bare = token_losses(method, **given), token_losses("opd", **given)
    assert float(bare.loss) == pytest.approx(-math.log(1.6))
    assert float(found.loss) == pytest.approx(-math.log(1.6) * (1 + 1.25 + 2) / 3)
    assert method.as_published, "the engine is no part of what a paper says"
    assert {watch.name for watch in method.watch} >= {"importance", "ess"}


def test_terms_that_correct_by_themselves_or_need_none_stay_as_they_are() -> None:
    own = load("opd", correction="sequence")
    assert corrected_for_engine(own).terms == own.terms
    closed = load("gkd")
    assert corrected_for_engine(closed).terms == closed.terms
    assert corrected_for_engine(closed).watch == closed.watch
    mixed = load("eopd")
    terms = zip(mixed.terms, corrected_for_engine(mixed).terms, strict=True)
    assert [before is after for before, after in terms] == [not term.estimator.uses_old_logp for term in mixed.terms]


def test_answers_that_no_engine_wrote_have_the_weight_one() -> None:
    given: dict[str, Any] = {"student_logits": STUDENT, "teacher_logits": TEACHER, "tokens": TOKENS}
    found = token_losses(corrected_for_engine(load("opd")), **given)
    assert float(found.loss) == pytest.approx(-math.log(1.6))
