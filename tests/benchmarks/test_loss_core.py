"""The benchmark of the loss core compares like with like."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("loss_core")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["retort, one pass", "retort, recompute", "TRL", "Liger"])
def test_all_systems_compute_what_the_dense_one_does(bench: ModuleType, name: str, masked: bool) -> None:
    package = {"TRL": "trl", "Liger": "liger_kernel"}.get(name)
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed (it is no dependency)")
    given = bench.Inputs.make(12, torch.float32, "cpu", masked=masked, vocab=101, width=16)
    wanted = bench.dense(given), *given.gradients()
    found = bench.SYSTEMS[name](given), *given.gradients()
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=1e-5, atol=1e-6)


def test_the_table_has_a_row_for_every_system_that_ran(bench: ModuleType) -> None:
    best = {"floor": 2.0, "dense": 3.0, "dense, half masked": 1.5}
    shown = bench.table("float32", 256, best, {"dense": 9.6e-7}, {"dense": 1072.0})
    assert shown.splitlines()[-1] == "| dense | 3.00 | 1.50 | 0.50 | 9.6e-07 | 1,072 |"


def test_the_row_with_four_terms_has_four(bench: ModuleType) -> None:
    given = bench.Inputs.make(12, torch.float64, "cpu", vocab=101, width=16)
    four, gradients = bench.retort_four(given), given.gradients()
    student = (given.hidden_ND @ given.weight_VD.t()).log_softmax(-1)
    teacher = (given.teacher_ND @ given.teacher_VD.t()).log_softmax(-1)

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one.exp() * (one - other)).sum(-1).mean()

    wanted = kl(student, teacher) + kl(teacher, student)
    for weight in (0.5, 0.1):
        mixture = (weight * teacher.exp() + (1 - weight) * student.exp()).log()
        wanted = wanted + weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture)
    torch.testing.assert_close(four, wanted.detach())
    for mine, exact in zip(gradients, torch.autograd.grad(wanted, (given.hidden_ND, given.weight_VD)), strict=True):
        torch.testing.assert_close(mine, exact)
