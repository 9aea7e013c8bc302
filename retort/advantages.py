"""Advantages: how much the teacher prefers the token that was written. Axis letters: see `retort.types`."""

from __future__ import annotations

from torch import Tensor

from retort.context import Context
from retort.parts import Advantage
from retort.types import SAMPLED


def log_ratio() -> Advantage:
    r"""The sampled log-ratio :math:`\log p_T(y_t) - \log p_{old}(y_t)`, nats; its mean is minus the reverse KL.

    Taken against the student before the first update on the batch, so it is fixed while a batch is used several times.
    """

    def value(context: Context, view: str) -> Tensor:
        return context.signal(view).sampled_logp_N - context.old_logp_N

    return Advantage("log_ratio", value, frozenset({SAMPLED}))
