"""Default torch settings during a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Runs its block under torch's default settings, and restores the caller's afterwards.

    A run takes gradients, chooses its own precision and names every device that is not the CPU. A caller's `no_grad`,
    `inference_mode`, `autocast`, default dtype or default device would change its numbers or end it.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
