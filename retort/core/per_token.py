"""The loss core: from hidden states to one number per step without a whole [N, V]. Axis letters: see `retort.core`.

Steps are cut into chunks, large enough for the matrix products. A chunk's logits are cut into blocks of rows, small
enough for the CPU's cache, on which a method is evaluated by plain autograd. The gradient of a block's logits
overwrites them, and two more products carry it to hidden states and head. So memory grows neither with N nor with the
number of terms, and no term needs code of its own to be cheap.

`loss_pass` does all of that at once, for a loss that is a sum over steps: four products. `per_token` gives the values
first and computes the logits again when their gradient arrives: six products. `Core.dense`, the plain version, defines
both.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from retort.core.chunked import BLOCK_ELEMENTS, CHUNK_ELEMENTS, Chunked, Pass, block_rows, chunk_rows, cuts
from retort.core.definition import Core
from retort.core.head import rounds
from retort.core.signals import SignalRows, TeacherSignal

__all__ = ["BLOCK_ELEMENTS", "CHUNK_ELEMENTS", "Core", "chunk_rows", "in_blocks", "loss_pass", "per_token"]

#: Below this number of elements, plain autograd over everything at once is fastest.
DENSE_ELEMENTS = 2**22


def in_blocks(signal: TeacherSignal, vocab: int) -> Iterator[SignalRows]:
    """Yields a signal's rows at all its steps: products are computed by the chunk, all else by the block."""
    device = signal.tokens_N.device
    for chunk in cuts(signal.steps, chunk_rows(vocab, device)):
        held = signal.precomputed(chunk, vocab)
        for block in cuts(held.steps, block_rows(vocab, device)):
            yield held.rows(block, vocab)


def per_token(core: Core, hidden_ND: Tensor, *, chunk: int | None = None) -> dict[str, Tensor]:
    """Returns the values of every step, without ever holding all logits.

    Args:
        core: The function to evaluate.
        hidden_ND: The student's hidden states, or its logits.
        chunk: Steps per chunk; None chooses. If it is N or more, this is `Core.dense`, unless a CPU multiplies in fewer
            bits than fp32: then logits are made more exactly than there.

    Returns:
        Named values [N], differentiable in the hidden states and in the head's parts.

    Raises:
        SignalError: A signal is misaligned, not finite, or lacks what is needed.
    """
    return _run(core, hidden_ND, None, chunk)[1]


def loss_pass(
    core: Core, hidden_ND: Tensor, loss: Callable[[Mapping[str, Tensor], slice], Tensor], *, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes a loss that is a sum over steps, and forms its gradient on the way.

    Args:
        core: The function to evaluate.
        hidden_ND: The student's hidden states, or its logits.
        loss: (values of some steps, their slice) -> their part of the loss, a scalar.
        chunk: As in `per_token`.

    Returns:
        The loss, differentiable in the hidden states and in the head's parts; and all values, [N] each, as `per_token`
        gives them. Only differentiating those values costs computing the logits again.

    Raises:
        SignalError: As in `per_token`.
    """
    total, values = _run(core, hidden_ND, loss, chunk)
    assert total is not None
    return total, values


def _run(
    core: Core, hidden_ND: Tensor, loss: Callable[..., Tensor] | None, chunk: int | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    for signal in core.signals.values():
        signal.check_tokens(core.steps.tokens_N)
    small = core.count <= chunk if chunk else core.count * core.widest <= DENSE_ELEMENTS
    dtype = _product_dtype(hidden_ND)
    plain = core.head is not None and not core.head.shard.spread and not rounds(dtype, hidden_ND.device)
    if core.head is None or core.count == 0 or (small and plain):
        values = core.dense(hidden_ND)
        return (None if loss is None else loss(values, slice(0, core.count))), values
    pass_ = Pass(core, loss, chunk or chunk_rows(core.widest, hidden_ND.device), dtype)
    total, *found = Chunked.apply(pass_, hidden_ND, *core.head.parts)  # pyright: ignore[reportGeneralTypeIssues]
    return (None if loss is None else total), dict(zip(pass_.names, found, strict=True))


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
