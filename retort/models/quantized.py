"""Frozen models in fewer bits, through transformers' quantisers (the extra `quantized`).

Only weights are rounded; products stay in the model's precision. So a token's numbers do not depend on which others are
computed with it, as they do where activations are rounded, too. The head is not rounded.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from retort.errors import UserError

__all__ = ["Bits", "arguments", "count", "need", "plain", "sample", "words"]

#: Bits of a weight.
Bits = Literal[8, 4]
#: The package that rounds, by bits.
_PACKAGES = {8: "torchao", 4: "bitsandbytes"}


def need(bits: Bits, label: str) -> None:
    """Raises `UserError` if what rounds weights to so many bits is not installed."""
    lacking = [name for name in (_PACKAGES[bits], "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"{label}: bits = {bits} needs {' and '.join(lacking)}: pip install 'retort-distill[quantized]'"
        )


def arguments(bits: Bits, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given to round a model's weights.

    Args:
        bits: 8: int8, with a scale for each row of a matrix. 4: NF4 (arXiv 2305.14314), with one for each 64 weights.
        dtype: Dtype of the products.
        device: Device of the weights.
    """
    if bits == 4:
        from transformers import BitsAndBytesConfig

        how: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": how, "device_map": {"": device}}


def words(bits: Bits) -> str:
    """How the weights were rounded, for the summary and the card."""
    kind = "int8, a scale for each row" if bits == 8 else "NF4, a scale for each 64 weights"
    return f"rounded to {bits} bits when loaded ({kind})"


def plain(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is kept in: itself, or its codes and scales."""
    state = getattr(weight, "quant_state", None)  # of bitsandbytes
    if state is not None:
        return [weight.detach(), state.absmax]
    if type(weight).__module__.startswith("torchao."):  # a slice of several ranks has parts too, but is one tensor
        names: list[str] = weight.__tensor_flatten__()[0]  # type: ignore[operator]
        return [getattr(weight, name).detach() for name in names]
    return [weight.detach()]


def count(weight: Tensor) -> int:
    """Number of weights in a tensor, also where several are kept in one of its elements."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(torch.Size(state.shape).numel())


def sample(weight: Tensor) -> str:
    """Some numbers of a weight as text, about 64 of each tensor that it is kept in, evenly spread."""
    flats = [part.flatten() for part in plain(weight)]
    return " ".join(str(flat[:: max(1, len(flat) // 64)].float().cpu().tolist()) for flat in flats)
