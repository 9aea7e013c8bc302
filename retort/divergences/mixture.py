"""Mixtures of two distributions in log space. Axis letters: see `retort.core`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixture(teacher_logp_NV: Tensor, student_logp_NV: Tensor, teacher_weight: float) -> Tensor:
    """Log-probs [N, V] of w p_T + (1 - w) p_S, 0 < w < 1.

    Where both rule an id out, the result is finite and means nothing (logaddexp(-inf, -inf) has a NaN gradient): such
    an id adds nothing to a KL from either side.
    """
    neither_NV = (teacher_logp_NV == -math.inf) & (student_logp_NV == -math.inf)
    return torch.logaddexp(
        teacher_logp_NV.masked_fill(neither_NV, 0.0) + math.log(teacher_weight),
        student_logp_NV.masked_fill(neither_NV, 0.0) + math.log1p(-teacher_weight),
    )
