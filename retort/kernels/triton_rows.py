"""`retort.kernels.reference` in Triton: the same two functions, each in one pass over the logits. Axes: `retort.core`.

Inputs are fp32, bf16 or fp16; arithmetic is always fp32. A JSD costs a second pass, because its terms need the
normalisers first. A row of logits may lie in a wider buffer (a stride above V); nothing is copied for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from retort.errors import UserError
from retort.kernels import available
from retort.kernels.rows import RowStatistics, Upstream, check_logits, summed_by_id

__all__ = ["row_gradient", "row_statistics"]

#: Ids that a program processes together. The sums over a row take 8 numbers per lane, so 8 warps hold 64 registers a
#: thread of them; the gradient sums nothing.
STATISTICS_BLOCK, STATISTICS_WARPS = 2048, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
IDS_BLOCK = 256
#: Programs per multiprocessor that keep the memory busy; with fewer rows than that, each row is split.
PROGRAMS = 4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_statistics(
    student_CV: Tensor,
    teacher_CV: Tensor | None = None,
    *,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    jsd_weight: float | None = None,
) -> RowStatistics:
    """Normalisers, entropies and divergences of each row, nats, in fp32: `retort.kernels.reference.row_statistics`.

    Args:
        student_CV: Logits [C, V] in fp32, bf16 or fp16; -inf is an impossible id.
        teacher_CV: The teacher's logits, same shape, on the same device; None for the student's statistics only.
        student_scale: Factor of the student's logits, > 0.
        teacher_scale: Factor of the teacher's logits, > 0.
        jsd_weight: Weight of the teacher in the mixture, 0 < w < 1; None for no JSD (and no second pass).

    Raises:
        ValueError: Shapes, dtypes, devices, scales or arguments that do not fit together.
        UserError: Triton is missing or cannot run on this device; a JSD weight at or beyond the ends.
    """
    check_logits(student_CV, teacher_CV, student_scale, teacher_scale, jsd_weight)
    kernels = _kernels(student_CV.device)
    student_scale, teacher_scale = _single(student_scale), _single(teacher_scale)
    student_CV = _dense_rows(student_CV, "student_CV", student_CV)
    rows, vocab = student_CV.shape
    if teacher_CV is not None:
        teacher_CV = _dense_rows(teacher_CV, "teacher_CV", student_CV)
    block = _block(vocab, STATISTICS_BLOCK)
    splits = _splits(rows, -(-vocab // block), student_CV.device)
    blocks = -(-vocab // (block * splits))
    merged = student_CV.new_empty(2 if teacher_CV is None else 6, rows, dtype=torch.float32)
    if not rows:
        return _named(merged, merged.new_empty(2, 0) if jsd_weight is not None else None)
    grid, launch, lanes = (rows, splits), {"BLOCK": block, "num_warps": STATISTICS_WARPS}, _power_of_2(splits)
    with _on(student_CV.device):
        if teacher_CV is None:
            partial = merged.new_empty(3, rows, splits)
            kernels.student_moments[grid](
                student_CV, partial, vocab, student_CV.stride(0), blocks, student_scale, **launch
            )
            kernels.merge_student[(rows,)](partial, merged, splits, student_scale, SPLITS=lanes, num_warps=1)
            return _named(merged, None)
        shape = (vocab, student_CV.stride(0), teacher_CV.stride(0), blocks, student_scale, teacher_scale)
        partial = merged.new_empty(10, rows, splits)
        kernels.pair_moments[grid](student_CV, teacher_CV, partial, *shape, **launch)
        kernels.merge_pair[(rows,)](partial, merged, splits, student_scale, teacher_scale, SPLITS=lanes, num_warps=1)
        if jsd_weight is None:
            return _named(merged, None)
        partial = merged.new_empty(2, rows, splits)
        kernels.jsd_moments[grid](student_CV, teacher_CV, merged[0], merged[2], partial, *shape, jsd_weight, **launch)
        return _named(merged, partial.sum(-1))


def row_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    statistics: RowStatistics,
    *,
    lse_C: Tensor | None = None,
    entropy_C: Tensor | None = None,
    reverse_C: Tensor | None = None,
    forward_C: Tensor | None = None,
    jsd_C: Tensor | None = None,
    jsd_weight: float | None = None,
    ids_CK: Tensor | None = None,
    ids_grad_CK: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    out_CV: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the student's unscaled logits: `retort.kernels.reference.row_gradient` defines it.

    Args:
        student_CV: The student's logits [C, V] that the statistics were computed from.
        teacher_CV: The teacher's logits; read only for a divergence.
        statistics: The result of `row_statistics` for them.
        lse_C: Derivative of the loss by the student's log-sum-exp, [C]; None for 0, like all that follow.
        entropy_C: Derivative by the student's entropy.
        reverse_C: Derivative by KL(student || teacher).
        forward_C: Derivative by KL(teacher || student).
        jsd_C: Derivative by the Jensen-Shannon divergence.
        jsd_weight: As in `row_statistics`; goes with `jsd_C`.
        ids_CK: int64 ids [C, K] below V whose log-probs the loss reads; an id that occurs twice counts twice.
        ids_grad_CK: Derivatives [C, K] of the loss by those log-probs.
        student_scale: As in `row_statistics`.
        teacher_scale: As in `row_statistics`.
        out_CV: Tensor for the result, fp32, bf16 or fp16; `student_CV` itself works, other memory that overlaps it does
            not. None for a new tensor in the dtype of the logits.

    Returns:
        `out_CV`, or the new tensor. Each number is rounded to its dtype once.

    Raises:
        ValueError: Shapes, dtypes, devices or arguments that do not fit together.
        UserError: Triton is missing or cannot run on this device.
    """
    check_logits(student_CV, teacher_CV, student_scale, teacher_scale, jsd_weight)
    upstream = Upstream(lse_C, entropy_C, reverse_C, forward_C, jsd_C, jsd_weight, ids_CK, ids_grad_CK)
    upstream.check(student_CV, teacher_CV, statistics)
    kernels = _kernels(student_CV.device)
    out_CV = torch.empty_like(student_CV, memory_format=torch.contiguous_format) if out_CV is None else out_CV
    _check_out(out_CV, student_CV)
    student_CV = _dense_rows(student_CV, "student_CV", student_CV)
    teacher_CV = _dense_rows(teacher_CV, "teacher_CV", student_CV) if teacher_CV is not None else None
    teacher_CV = teacher_CV if upstream.needs_teacher else None
    rows, vocab = student_CV.shape
    if not rows:
        return out_CV
    numbers = _numbers(statistics, upstream, 0.0 if jsd_weight is None else jsd_weight, (student_scale, teacher_scale))
    block = _block(vocab, GRADIENT_BLOCK)
    with _on(student_CV.device):
        # The logits at the ids are read before the first kernel may overwrite them.
        at_ids = None if ids_CK is None else _at_ids(student_CV, teacher_CV, ids_CK)
        kernels.gradient[(rows, -(-vocab // block))](
            student_CV, teacher_CV, out_CV, vocab, student_CV.stride(0),
            0 if teacher_CV is None else teacher_CV.stride(0), out_CV.stride(0), *numbers,
            BLOCK=block, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        if at_ids is not None and ids_CK is not None and ids_grad_CK is not None and ids_CK.numel():
            grads_CK = summed_by_id(ids_CK, ids_grad_CK.float(), vocab).contiguous()
            kept, block = ids_CK.shape[1], _block(ids_CK.shape[1], IDS_BLOCK)
            kernels.gradient_at_ids[(rows, -(-kept // block))](
                *at_ids, ids_CK.contiguous(), grads_CK, out_CV, kept, out_CV.stride(0), *numbers,
                BLOCK=block, num_warps=1,
            )  # fmt: skip
    return out_CV


def _numbers(statistics: RowStatistics, upstream: Upstream, weight: float, scales: tuple[float, float]) -> list[Any]:
    """The arguments of both gradient kernels about the rows, in order."""
    tensors = (
        statistics.student_lse_C,
        statistics.student_entropy_C,
        statistics.teacher_lse_C,
        statistics.reverse_kl_C,
        statistics.mixture_kl_C,
        upstream.pull_C,
        upstream.entropy_C,
        upstream.reverse_C,
        upstream.forward_C,
        upstream.jsd_C,
    )
    # An upstream gradient is often an expanded scalar, with stride 0.
    return [None if values_C is None else values_C.contiguous() for values_C in tensors] + [
        _single(number) for number in (*scales, weight)
    ]


def _at_ids(student_CV: Tensor, teacher_CV: Tensor | None, ids_CK: Tensor) -> tuple[Tensor, Tensor | None]:
    return student_CV.gather(1, ids_CK), None if teacher_CV is None else teacher_CV.gather(1, ids_CK)


def _named(merged: Tensor, jsd: Tensor | None) -> RowStatistics:
    """Statistics from the rows of the kernels' results."""
    return RowStatistics(*merged.unbind(0)) if jsd is None else RowStatistics(*merged.unbind(0), *jsd.unbind(0))


def _kernels(device: torch.device) -> Any:
    """The module with the kernels; raises `UserError` with the reason where there is none."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("kernels: the package triton is missing: pip install 'retort-distill[kernels]'")
    if not available(device):
        raise UserError(
            f"kernels: Triton runs on CUDA devices, not on {device.type} (TRITON_INTERPRET=1, set before the first "
            "use, runs it on the CPU, slowly)"
        )
    return importlib.import_module("retort.kernels.triton_jit")


def _single(number: float) -> float:
    """A number rounded to fp32, as the device gets it; the interpreter would otherwise keep all of its digits."""
    return ctypes.c_float(number).value


def _dense_rows(logits_CV: Tensor, name: str, student_CV: Tensor) -> Tensor:
    """The logits with ids contiguous; only tensors that are neither a slice nor contiguous are copied."""
    if logits_CV.dtype not in _DTYPES:
        raise ValueError(f"{name}: the kernels take fp32, bf16 or fp16, not {logits_CV.dtype}; use the reference")
    if logits_CV.device != student_CV.device:
        raise ValueError(f"{name} is on {logits_CV.device}, the student's logits on {student_CV.device}")
    return logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()


def _check_out(out_CV: Tensor, student_CV: Tensor) -> None:
    if out_CV.shape != student_CV.shape or out_CV.device != student_CV.device or out_CV.dtype not in _DTYPES:
        raise ValueError(
            f"out_CV must be fp32, bf16 or fp16 of shape {tuple(student_CV.shape)} on {student_CV.device}, "
            f"not {out_CV.dtype} of shape {tuple(out_CV.shape)} on {out_CV.device}"
        )
    if out_CV.stride(1) != 1:
        raise ValueError("out_CV must have its ids side by side (stride 1)")


def _power_of_2(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _block(width: int, largest: int) -> int:
    """Ids in a block: a power of two, as Triton's ranges must be."""
    return max(16, min(largest, _power_of_2(width)))


def _splits(rows: int, blocks: int, device: torch.device) -> int:
    """The number of parts to split a row into, so that a few rows still keep the whole device busy."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(blocks, PROGRAMS * processors // max(rows, 1)))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the tensors' device current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
