"""The KL of two Gaussians of one standard deviation. Axis letters: see `retort.core`."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.core.distribution import as_compute
from retort.core.gaussian import Gaussian
from retort.errors import UserError


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor | float) -> Tensor:
    r"""KL of :math:`N(\mu, \sigma^2 I)` and :math:`N(\mu', \sigma^2 I)`, nats per row, summed over dimensions.

    .. math:: D_{KL} = \frac{\Vert\mu - \mu'\Vert^2}{2\sigma^2}

    It is the same in both directions, and differentiable in both means. There is no hidden scale: code that divides by
    the number of dimensions, or leaves a factor out of the standard deviation, computes another number.

    Args:
        mean: [N, ...], any float dtype; computed in fp32 or float64, summed in float64.
        other_mean: Of the same shape.
        std: Standard deviation of every element: a number, or [N].

    Returns:
        [N], float64.

    Raises:
        UserError: Shapes that do not fit.
        SignalError: A number that is not finite, or a standard deviation that is not positive.

    Example:
        >>> from torch import tensor
        >>> from retort.divergences import gaussian_kl
        >>> gaussian_kl(tensor([[0.0, 0.0]]), tensor([[3.0, 4.0]]), 1.0)  # 5^2 / 2
        tensor([12.5000], dtype=torch.float64)
    """
    if mean.shape != other_mean.shape or mean.ndim < 2:
        raise UserError(f"both means must be [N, ...], not {tuple(mean.shape)} and {tuple(other_mean.shape)}")
    one_ND, other_ND = (as_compute(values).flatten(1) for values in (mean, other_mean))
    std_N = as_compute(torch.as_tensor(std, device=one_ND.device))
    if std_N.ndim == 0:
        std_N = std_N.expand(len(one_ND))
    elif std_N.shape != one_ND.shape[:1]:
        raise UserError(f"std must be a number or [N] = ({len(one_ND)},), not {tuple(std_N.shape)}")
    return Gaussian(one_ND, std_N).reverse_kl(Gaussian(other_ND, std_N))
