"""An estimate of the gradient's noise from the optimizer's own state."""

from __future__ import annotations

import torch

from retort.models.sharding import full


def adam_variance(optimizer: torch.optim.Optimizer) -> float:
    r"""Variance of the gradient summed over all weights, from Adam's moments: :math:`\sum \hat v - \sum \hat m^2`.

    Both moments are corrected for their bias. They forget at different rates and see gradients after clipping, so it is
    a proxy: it follows the noise over many updates and may even fall below 0 while gradients grow or shrink fast. After
    the first update it is 0. Costs one pass over both moments.
    """
    total = 0.0
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            step = float(state["step"])
            second = float(full(state["exp_avg_sq"].sum(dtype=torch.float64))) / (1.0 - beta2**step)
            mean = float(full(torch.linalg.vector_norm(state["exp_avg"], dtype=torch.float64))) / (1.0 - beta1**step)
            total += second - mean**2
    return total
