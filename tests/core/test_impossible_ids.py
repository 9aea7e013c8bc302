"""Divergences of one pair of distributions, asked for one after another, where a side rules out an id."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from retort.core.distribution import Distribution


@pytest.mark.parametrize("order", list(permutations(("forward", "reverse", "jsd"))), ids=" then ".join)
def test_no_divergence_depends_on_those_asked_for_before(order: tuple[str, ...]) -> None:
    student_CV = torch.tensor([[0.0, 1.0, 2.0], [-math.inf, 1.0, 2.0], [0.0, 1.0, 2.0], [-math.inf, 1.0, 2.0]])
    teacher_CV = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 2.0], [-math.inf, 0.0, 2.0], [-math.inf, 0.0, 2.0]])

    def asked(student: Distribution, teacher: Distribution, name: str) -> torch.Tensor:
        return student.jsd(teacher, 0.3) if name == "jsd" else getattr(student, f"{name}_kl")(teacher)

    student, teacher = Distribution(student_CV), Distribution(teacher_CV)
    found = {name: asked(student, teacher, name) for name in order}
    for name in order:
        alone = asked(Distribution(student_CV), Distribution(teacher_CV), name)
        assert torch.equal(found[name], alone), name
    assert found["forward"].isinf().tolist() == [False, True, False, False]
    assert found["reverse"].isinf().tolist() == [False, False, True, False]
    assert found["jsd"].isfinite().all()
