"""Gates on an almost deterministic structure (the contract). Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.parts import Weight


def on_contract(threshold: float = 0.9) -> Weight:
    """1 where the teacher's most likely token has at least this probability, else 0."""

    def value(context: Context, view: str) -> Tensor:
        return (context.signal(view).topk(1)[1].squeeze(-1).exp() >= threshold).to(torch.get_default_dtype())

    return Weight(f"teacher's top-1 >= {threshold:g}", value, frozenset({Need("topk", 1)}))
