"""One Gaussian per denoising step, and the divergence of two. Axis letters: see `retort.core`.

Sums over the elements of a latent are in float64, whatever the latents are: a latent of an image has tens of thousands,
and a log-ratio is a small difference of two log-probs of that size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retort.core.needs import NeedKind
from retort.core.policy import Policy
from retort.errors import SignalError


class Gaussian(Policy):
    r"""The policy :math:`N(\mu, \sigma^2 I)` over the next latent, one per step.

    Attributes:
        mean_ND: Mean; live if it is the student's. Latents of more axes are flattened.
        std_N: Standard deviation of every element, positive.
    """

    #: The whole policy, but no vocabulary. The entropy is not offered: it is that of the sampler's noise, the same
    #: whatever the model says, so nothing can be learnt from it.
    offers: frozenset[NeedKind] = frozenset({"sampled", "gaussian"})

    def __init__(self, mean_ND: Tensor, std_N: Tensor, source: str = "the policy") -> None:
        """Takes the mean [N, D] and the standard deviation [N], in fp32 or float64.

        Args:
            mean_ND: Mean of each step.
            std_N: Standard deviation of each step.
            source: Whose it is, for messages.

        Raises:
            SignalError: Shapes that do not fit, a number that is not finite, or a standard deviation that is not
                positive.
        """
        check_gaussian(mean_ND, std_N, source)
        self.mean_ND, self.std_N = mean_ND, std_N

    def logp_of(self, decided: Tensor) -> Tensor:
        """Log-density of latents [C, D], summed over their elements, [C], nats, float64."""
        return self.best_logp() - 0.5 * self._squares(decided)

    def best_logp(self) -> Tensor:
        """Log-density at the mean, [C], nats, float64."""
        return -self._width * (self._log_std_C + 0.5 * math.log(2.0 * math.pi))

    def entropy(self) -> Tensor:
        """Differential entropy [C], nats, float64; it may be negative."""
        return self._width * (self._log_std_C + 0.5 * math.log(2.0 * math.pi * math.e))

    def reverse_kl(self, teacher: Policy) -> Tensor:
        r"""KL(self || teacher), [C], nats, float64.

        With one standard deviation on both sides it is :math:`\Vert\mu_S - \mu_T\Vert^2 / 2\sigma^2`, and equals the
        forward KL.
        """
        other = _gaussian(teacher)
        log_ratio_C = self._log_std_C - other._log_std_C
        of_spread_C = 0.5 * torch.expm1(2.0 * log_ratio_C) - log_ratio_C
        return 0.5 * other._squares(self.mean_ND) + self._width * of_spread_C

    def forward_kl(self, teacher: Policy) -> Tensor:
        """KL(teacher || self), [C], nats, float64."""
        return _gaussian(teacher).reverse_kl(self)

    @property
    def _width(self) -> int:
        return self.mean_ND.shape[1]

    @property
    def _log_std_C(self) -> Tensor:
        return self.std_N.double().log()

    def _squares(self, latents_ND: Tensor) -> Tensor:
        """Squared distance from the mean, in standard deviations, summed over elements, [C]."""
        return ((latents_ND - self.mean_ND) / self.std_N[:, None]).square().sum(-1, dtype=torch.float64)


def _gaussian(policy: Policy) -> Gaussian:
    if not isinstance(policy, Gaussian):
        raise SignalError(f"nothing compares a Gaussian over latents with a {type(policy).__name__}")
    return policy


def check_gaussian(mean_ND: Tensor, std_N: Tensor, source: str, valid_N: Tensor | None = None) -> None:
    """Refuses what is no Gaussian per step; steps that are not valid are only held to the shapes.

    Raises:
        SignalError: See `Gaussian`.
    """
    if mean_ND.ndim != 2 or std_N.shape != mean_ND.shape[:1]:
        shapes = f"{tuple(mean_ND.shape)} and {tuple(std_N.shape)}"
        raise SignalError(f"{source}: mean and standard deviation must be [N, D] and [N], not {shapes}")
    if not (mean_ND.is_floating_point() and std_N.is_floating_point()):
        raise SignalError(
            f"{source}: mean and standard deviation must be floats, not {mean_ND.dtype} and {std_N.dtype}"
        )
    reasons = {
        "mean is not finite": ~mean_ND.isfinite().all(-1),
        "standard deviation is not finite": ~std_N.isfinite(),
        "standard deviation is 0: without noise a step is certain, and the KL to any other mean is infinite": std_N
        == 0,
        "standard deviation is negative": std_N < 0,
    }
    for what, bad_N in reasons.items():
        bad_N = bad_N if valid_N is None else bad_N & valid_N.to(bad_N.device)
        if bool(bad_N.any()):
            raise SignalError(f"{source}: the {what} (step {int(bad_N.nonzero()[0])} of the batch)")
