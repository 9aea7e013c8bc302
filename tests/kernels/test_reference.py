"""The reference against float64 autograd on the definitions in `retort.divergences`, and what it refuses."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.divergences import jsd_values, kl_values
from retort.errors import UserError
from retort.kernels import available, reference

WEIGHT = 0.3
SCALES = (0.7, 1.3)


def logits(rows: int = 5, vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_CV = 3.0 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return student_CV, student_CV + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def by_definition(student_CV: Tensor, teacher_CV: Tensor, ids_CK: Tensor) -> dict[str, Tensor]:
    """The numbers as the rest of Retort defines them, differentiable, by the name that `row_gradient` has for each."""
    scaled_CV = student_CV * SCALES[0]
    logp_CV, logq_CV = scaled_CV.log_softmax(-1), (teacher_CV * SCALES[1]).log_softmax(-1)
    return {
        "lse_C": scaled_CV.logsumexp(-1),
        "entropy_C": -(logp_CV.exp() * logp_CV.masked_fill(logp_CV == -math.inf, 0.0)).sum(-1),
        "reverse_C": kl_values(logp_CV, logq_CV),
        "forward_C": kl_values(logq_CV, logp_CV),
        "jsd_C": jsd_values(logq_CV, logp_CV, WEIGHT),
        "ids_grad_CK": logp_CV.gather(1, ids_CK),
    }


def known(student_CV: Tensor, teacher_CV: Tensor) -> Any:
    return reference.row_statistics(
        student_CV, teacher_CV, student_scale=SCALES[0], teacher_scale=SCALES[1], jsd_weight=WEIGHT
    )


@pytest.mark.parametrize("ruled_out", ["nothing", "by both", "by the teacher", "by the student"])
def test_statistics_are_the_definitions(ruled_out: str) -> None:
    student_CV, teacher_CV = logits()
    if ruled_out in ("by both", "by the student"):
        student_CV[1:, 3] = -math.inf
    if ruled_out in ("by both", "by the teacher"):
        teacher_CV[1:, 3] = -math.inf
    found = known(student_CV, teacher_CV)
    expected = by_definition(student_CV, teacher_CV, torch.zeros(5, 1, dtype=torch.int64))
    assert expected["reverse_C"].isinf().any() == (ruled_out == "by the teacher")
    torch.testing.assert_close(found.student_lse_C, expected["lse_C"])
    torch.testing.assert_close(found.student_entropy_C, expected["entropy_C"])
    torch.testing.assert_close(found.reverse_kl_C, expected["reverse_C"])
    torch.testing.assert_close(found.forward_kl_C, expected["forward_C"])
    torch.testing.assert_close(found.jsd_C, expected["jsd_C"])


@pytest.mark.parametrize("kind", ["lse_C", "entropy_C", "reverse_C", "forward_C", "jsd_C", "ids_grad_CK"])
@pytest.mark.parametrize("banned", [False, True])
def test_gradient_is_autograds(kind: str, banned: bool) -> None:
    student_CV, teacher_CV = logits()
    if banned:
        # Autograd through log_softmax has NaN for an id at -inf: there the formula says 0, and the rest must agree.
        student_CV[:, 3] = teacher_CV[:, 3] = -math.inf
    ids_CK = torch.tensor([[0, 4, 4]]).expand(5, 3)
    kept = [i for i in range(11) if not (banned and i == 3)]
    small_CV = student_CV[:, kept].clone().requires_grad_()
    ids = torch.tensor([[kept.index(i) for i in (0, 4, 4)]]).expand(5, 3)
    value = by_definition(small_CV, teacher_CV[:, kept], ids)[kind]
    upstream = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(value, small_CV, upstream)
    arguments: dict[str, Any] = {kind: upstream}
    if kind == "jsd_C":
        arguments["jsd_weight"] = WEIGHT
    if kind == "ids_grad_CK":
        arguments["ids_CK"] = ids_CK
    found = reference.row_gradient(
        student_CV, teacher_CV, known(student_CV, teacher_CV), student_scale=SCALES[0], teacher_scale=SCALES[1],
        **arguments,
    )  # fmt: skip
    torch.testing.assert_close(found[:, kept], expected)
    if banned:
        assert found[:, 3].eq(0.0).all()


def test_what_is_no_distribution_has_no_numbers() -> None:
    student_CV, teacher_CV = logits(4)
    student_CV[0], student_CV[1, 2], student_CV[2, 2] = -math.inf, math.nan, math.inf
    found = known(student_CV, teacher_CV)
    assert found.student_lse_C[0] == -math.inf and found.student_lse_C[1:3].isnan().all()
    for name in ("student_entropy_C", "reverse_kl_C", "forward_kl_C", "jsd_C"):
        assert getattr(found, name).isnan().tolist() == [True, True, True, False], name
    assert found.teacher_entropy_C.isfinite().all()


def test_refuses_what_does_not_go_together() -> None:
    student_CV, teacher_CV = logits()
    found = reference.row_statistics(student_CV, teacher_CV)
    one_C = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="not shaped like the student's"):
        reference.row_statistics(student_CV, teacher_CV[:, :-1])
    with pytest.raises(ValueError, match="student_scale must be positive"):
        reference.row_statistics(student_CV, student_scale=0.0)
    with pytest.raises(UserError):
        reference.row_statistics(student_CV, teacher_CV, jsd_weight=1.0)
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        reference.row_gradient(student_CV, None, found, reverse_C=one_C)
    with pytest.raises(ValueError, match="jsd_C and jsd_weight go together"):
        reference.row_gradient(student_CV, teacher_CV, found, jsd_C=one_C)
    with pytest.raises(ValueError, match="made with jsd_weight"):
        reference.row_gradient(student_CV, teacher_CV, found, jsd_C=one_C, jsd_weight=WEIGHT)
    with pytest.raises(ValueError, match="the logits have 5 rows"):
        reference.row_gradient(student_CV, teacher_CV, found, lse_C=one_C[:2])
    with pytest.raises(ValueError, match="ids_CK and ids_grad_CK go together"):
        reference.row_gradient(student_CV, teacher_CV, found, ids_CK=torch.zeros(5, 1, dtype=torch.int64))


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, retort.kernels, retort.core.distribution; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_are_not_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available("cpu")
