"""Row statistics of two sets of logits and their gradient: one definition, and kernels that read each logit once.

`reference` defines the numbers in plain torch. `triton_rows` computes the same in one pass over a chunk, without
storing the log-probs, probabilities and differences [C, V] that plain torch does. Nothing here knows autograd: the
caller wraps both functions. Importing this package does not import Triton. Axis letters: see `retort.core`.
"""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["available", "interpreting"]


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, slowly, as `TRITON_INTERPRET=1` requests."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in {"1", "true", "yes", "on", "y"}


def available(device: torch.device | str) -> bool:
    """Whether `retort.kernels.triton_rows` works on a device.

    It needs the package triton, and a CUDA device (AMD's have that name, too) or the interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.device(device).type == "cuda" or interpreting()
