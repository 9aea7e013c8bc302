"""The Triton kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes about two milliseconds per block of a row, so sizes here are small and odd.
"""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the package triton: make kernels")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU the kernels need TRITON_INTERPRET=1: make kernels", allow_module_level=True)

from retort.core import distribution
from retort.core.distribution import Distribution, Shard
from retort.errors import UserError
from retort.kernels import reference, triton_rows

# NumPy, in which the interpreter computes, warns of -inf - -inf; a GPU's compiler warns of a default of its own.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Largest error of a statistic, relative to 1 + its size, and of a gradient, relative to its size: half a unit in the
#: last place of the dtype it is written in. (The interpreter cuts digits off where a GPU rounds to bf16.)
STATISTIC = 2e-6
GRADIENT = {
    torch.float32: 4e-6,
    torch.bfloat16: 1.01 * 2.0 ** (-8 if DEVICE == "cuda" else -7),
    torch.float16: 1.01 * 2.0**-11,
}
KINDS = ("lse_C", "entropy_C", "reverse_C", "forward_C", "jsd_C")
SIZES = [(1, 7), (63, 7), (3, 129), (63, 129), (5, 1000), (1, 4099), (3, 4099)]
WEIGHT = 0.3


def random(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two models that differ little, in rows that stand in a wider buffer full of NaN."""
    generator = torch.Generator().manual_seed(seed + 1000 * rows + vocab)
    student_CV = 3.0 * torch.randn(rows, vocab, generator=generator)
    teacher_CV = student_CV + 0.3 * torch.randn(rows, vocab, generator=generator) + 5.0
    wide = torch.full((2, rows, vocab + 9), math.nan, dtype=dtype, device=DEVICE)
    wide[0, :, :vocab], wide[1, :, :vocab] = student_CV, teacher_CV
    return wide[0, :, :vocab], wide[1, :, :vocab]


def double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()


def check_statistics(student_CV: Tensor, teacher_CV: Tensor | None, **arguments: Any) -> tuple[Any, Any]:
    found = triton_rows.row_statistics(student_CV, teacher_CV, **arguments)
    expected = reference.row_statistics(student_CV.double(), double(teacher_CV), **arguments)
    for field in fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(
                ours.double(),
                theirs,
                rtol=STATISTIC,
                atol=STATISTIC,
                equal_nan=True,
                msg=lambda m, f=field: f"{f}: {m}",
            )
    return found, expected


def check_gradient(
    student_CV: Tensor, teacher_CV: Tensor, found: Any, expected: Any, slack: float = 1.0, **arguments: Any
) -> Tensor:
    out_CV = torch.full_like(student_CV.contiguous(), math.nan)
    grown = {name: double(a) if isinstance(a, Tensor) and a.is_floating_point() else a for name, a in arguments.items()}
    theirs = reference.row_gradient(student_CV.double(), teacher_CV.double(), expected, **grown)
    assert triton_rows.row_gradient(student_CV, teacher_CV, found, out_CV=out_CV, **arguments) is out_CV
    tolerance = slack * GRADIENT[student_CV.dtype]
    torch.testing.assert_close(
        out_CV.double(), theirs, rtol=tolerance, atol=max(1e-3 * tolerance, slack * 3e-7), equal_nan=True
    )
    return out_CV


def upstream(rows: int, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {kind: torch.randn(rows, generator=generator).to(DEVICE) for kind in kinds}
    return found | ({"jsd_weight": WEIGHT} if "jsd_C" in kinds else {})


def at_ids(rows: int, vocab: int, kept: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(kept)
    ids_CK = torch.randint(vocab, (rows, kept), generator=generator)
    ids_CK[:, -1] = ids_CK[:, 0]
    return {
        "ids_CK": ids_CK.to(DEVICE),
        "ids_grad_CK": torch.randn(rows, kept, generator=generator).to(DEVICE),
    }


@pytest.mark.parametrize("dtype", list(GRADIENT))
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_sizes_and_dtypes(rows: int, vocab: int, dtype: torch.dtype) -> None:
    student_CV, teacher_CV = random(rows, vocab, dtype)
    scales = {"student_scale": 0.7, "teacher_scale": 1.0}
    known = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT, **scales)
    check_gradient(student_CV, teacher_CV, *known, **upstream(rows), **at_ids(rows, vocab, 3), **scales)


@pytest.mark.parametrize("kind", [*KINDS, "ids"])
def test_each_gradient_alone(kind: str) -> None:
    student_CV, teacher_CV = random(4, 129)
    known = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    check_gradient(student_CV, teacher_CV, *known, **(at_ids(4, 129, 20) if kind == "ids" else upstream(4, (kind,))))


@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(1.0, 1.0), (0.01, 0.5), (4.0, 2.0)])
def test_scales(student_scale: float, teacher_scale: float) -> None:
    student_CV, teacher_CV = random(4, 1000)
    arguments = {"student_scale": student_scale, "teacher_scale": teacher_scale}
    known = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT, **arguments)
    # The digits of fp32 are those of the scaled logits: a log-prob of 50 has an error of 4e-6.
    slack = 10.0 if student_scale > 1.0 else 1.0
    check_gradient(student_CV, teacher_CV, *known, slack=slack, **upstream(4), **arguments)


def test_without_a_teacher_without_jsd_and_without_rows() -> None:
    student_CV, teacher_CV = random(3, 4099)
    found = check_statistics(student_CV, None)[0]
    assert found.teacher_lse_C is None
    assert check_statistics(student_CV, teacher_CV)[0].jsd_C is None
    pulled_CV = triton_rows.row_gradient(student_CV, None, found, lse_C=torch.ones(3, device=DEVICE))
    torch.testing.assert_close(pulled_CV, student_CV.softmax(-1), rtol=GRADIENT[torch.float32], atol=1e-9)
    nothing = triton_rows.row_statistics(student_CV[:0], teacher_CV[:0], jsd_weight=WEIGHT)
    assert all(getattr(nothing, field.name).shape == (0,) for field in fields(nothing))
    assert triton_rows.row_gradient(student_CV[:0], None, nothing).shape == (0, 4099)


def test_near_equal_models_keep_their_digits() -> None:
    student_CV, _ = random(3, 1000)
    teacher_CV = student_CV * (1.0 + 1e-3) + 100.0
    expected = reference.row_statistics(student_CV.double(), teacher_CV.double(), jsd_weight=WEIGHT)
    found = triton_rows.row_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    assert expected.reverse_kl_C is not None and expected.reverse_kl_C.max() < 2e-5
    for name in ("reverse_kl_C", "forward_kl_C"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=0.02, atol=0.0)


def test_the_peak_may_stand_in_any_block() -> None:
    student_CV, teacher_CV = random(4, 4099)
    student_CV[0, 4098], student_CV[1, 0], student_CV[2, 2047] = 40.0, 40.0, 40.0
    teacher_CV[0, 0], teacher_CV[1, 4098], teacher_CV[2, 2048] = 45.0, 45.0, 45.0
    known = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    check_gradient(student_CV, teacher_CV, *known, **upstream(4))


@pytest.mark.parametrize("vocab", [7, 4099])
def test_ruled_out_ids(vocab: int) -> None:
    student_CV, teacher_CV = random(4, vocab)
    student_CV[0, 2] = teacher_CV[0, 2] = -math.inf  # by both: nothing is infinite
    teacher_CV[1, vocab - 1] = -math.inf  # reverse KL
    student_CV[2, 0] = -math.inf  # forward KL
    student_CV[3, : vocab - 2] = teacher_CV[3, : vocab - 2] = -math.inf  # whole blocks
    found, expected = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    assert found.reverse_kl_C.isinf().tolist() == [False, True, False, False]
    assert found.forward_kl_C.isinf().tolist() == [False, False, True, False]
    assert found.jsd_C.isfinite().all()
    shut = upstream(4)
    shut["reverse_C"][1] = 0.0
    gradient_CV = check_gradient(student_CV, teacher_CV, found, expected, **shut)
    assert gradient_CV.isfinite().all()
    # A forward KL moves an id that only the student rules out; nothing else moves an impossible id.
    assert gradient_CV[0, 2] == 0.0 and gradient_CV[3, : vocab - 2].eq(0.0).all()
    shut["reverse_C"][1] = 1.0
    assert check_gradient(student_CV, teacher_CV, found, expected, **shut)[1].isnan().any()


def test_probabilities_that_underflow() -> None:
    student_CV, teacher_CV = random(2, 129)
    student_CV[0, 5], teacher_CV[0, 5] = -500.0, 3.0
    student_CV[1, 5], teacher_CV[1, 5] = 3.0, -500.0
    known = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    assert check_gradient(student_CV, teacher_CV, *known, **upstream(2)).isfinite().all()


@pytest.mark.parametrize("vocab", [7, 4099])
def test_what_is_no_distribution_has_no_numbers(vocab: int) -> None:
    student_CV, teacher_CV = random(4, vocab)
    student_CV[0], student_CV[1, vocab - 1], student_CV[2, 2] = -math.inf, math.nan, math.inf
    found, _ = check_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    assert found.student_lse_C[0] == -math.inf and found.student_lse_C[1:3].isnan().all()
    assert found.reverse_kl_C.isnan().tolist() == [True, True, True, False]
    check_statistics(teacher_CV, student_CV, jsd_weight=WEIGHT)


@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_in_place_and_strided(dtype: torch.dtype) -> None:
    student_CV, teacher_CV = random(3, 1000, dtype)
    found = triton_rows.row_statistics(student_CV, teacher_CV, jsd_weight=WEIGHT)
    arguments = upstream(3) | at_ids(3, 1000, 40)
    expected_CV = triton_rows.row_gradient(student_CV, teacher_CV, found, **arguments)
    padding = student_CV.as_strided((3, 9), student_CV.stride(), student_CV.storage_offset() + 1000)
    assert triton_rows.row_gradient(student_CV, teacher_CV, found, out_CV=student_CV, **arguments) is student_CV
    torch.testing.assert_close(student_CV, expected_CV, rtol=0.0, atol=0.0)
    assert padding.isnan().all()


def test_columns_apart_and_expanded_upstream() -> None:
    student_CV, teacher_CV = random(3, 129)
    turned_CV = student_CV.t().contiguous().t()
    assert turned_CV.stride(1) != 1
    known = check_statistics(turned_CV, teacher_CV)
    check_gradient(turned_CV, teacher_CV, *known, reverse_C=torch.ones((), device=DEVICE).expand(3))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    student_CV, _ = random(2, 7)
    with pytest.raises(ValueError, match="the kernels take fp32, bf16 or fp16"):
        triton_rows.row_statistics(student_CV.double())
    found = triton_rows.row_statistics(student_CV)
    with pytest.raises(ValueError, match="side by side"):
        triton_rows.row_gradient(student_CV, None, found, out_CV=student_CV.t().contiguous().t())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="not on cpu"):
        triton_rows.row_statistics(student_CV.cpu())


# --- inside Distribution ---


def numbers(student: Distribution, teacher: Distribution, ids_CK: Tensor) -> dict[str, Tensor]:
    return {
        "normaliser": student.normaliser_C,
        "logp_at": student.logp_at(ids_CK),
        "entropy": student.entropy(),
        "forward": student.forward_kl(teacher),
        "reverse": student.reverse_kl(teacher),
        "jsd": student.jsd(teacher, WEIGHT),
        "jsd again": student.jsd(teacher, 0.6),
    }


def value_and_gradient(
    student_CV: Tensor, teacher_CV: Tensor, ids_CK: Tensor, shut: dict[str, Tensor]
) -> dict[str, Tensor]:
    live_CV = student_CV.clone().requires_grad_()
    found = numbers(Distribution(live_CV), Distribution(teacher_CV), ids_CK)
    for name, value in list(found.items()):
        if value.requires_grad:
            weight = torch.linspace(-1.0, 1.0, len(value), device=DEVICE) * shut.get(name, torch.ones(1, device=DEVICE))
            weight = weight if value.ndim == 1 else weight[:, None].expand_as(value)
            found[f"d {name}"] = torch.autograd.grad(value, live_CV, weight, retain_graph=True)[0]
    assert sum(name.startswith("d ") for name in found) == 6
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("banned", [False, True])
def test_distribution_is_the_same_with_kernels(banned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student_CV, teacher_CV = random(4, 129)
    shut = {}
    if banned:
        student_CV[0, 3] = teacher_CV[0, 3] = student_CV[1, 4] = teacher_CV[2, 5] = -math.inf
        shut = {"reverse": torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE)}
    ids_CK = torch.tensor([[0, 7, 7]], device=DEVICE).expand(4, 3)
    monkeypatch.setattr(distribution, "KERNELS", False)
    expected = value_and_gradient(student_CV, teacher_CV, ids_CK, shut)
    monkeypatch.setattr(distribution, "KERNELS", True)
    found = value_and_gradient(student_CV, teacher_CV, ids_CK, shut)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=5e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_what_never_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    student_CV, _ = random(2, 7)

    class Spread(Shard):
        spread = True

    monkeypatch.setattr(distribution, "KERNELS", True)
    assert Distribution(student_CV)._kernels is triton_rows
    assert Distribution(student_CV, Spread())._kernels is None
    assert Distribution(student_CV.double())._kernels is None
    monkeypatch.setattr(distribution, "KERNELS", None)
    assert Distribution(student_CV.cpu())._kernels is None


def test_the_compiler_takes_the_kernels(tmp_path: Path) -> None:
    """Down to machine code for a GPU that need not be here."""
    import subprocess
    import sys

    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
