r"""Denoising steps as Gaussians: mean and true standard deviation of the next latent. Axis letters: see `retort.core`.

A flow-matching model predicts the velocity :math:`v = \epsilon - x_0` at :math:`x = (1-\sigma) x_0 + \sigma \epsilon`,
where :math:`\sigma` falls from 1 (noise) to 0 (data). A sampler that adds noise at each step makes a Gaussian of it,
whose standard deviation does not depend on the model. Pure functions; all of them keep float64 and compute in fp32
otherwise.

"sde" and "dance_sde" integrate the same equation with another noise per unit of :math:`\sigma`, s:

.. math:: \mu = x + v\,d + \frac{s^2}{2\sigma}\,(x + (1-\sigma)\,v)\,d, \quad d = \sigma_{next} - \sigma < 0,
          \quad std = s \sqrt{|d|}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from retort.core.distribution import as_compute
from retort.core.trajectory import Noise, Sampler, Straight
from retort.errors import UserError, did_you_mean


class DenoisingStep(NamedTuple):
    """The Gaussian of the next latent.

    Attributes:
        mean: [N, ...], differentiable in the velocity.
        std_N: Standard deviation of every element, [N]; it does not depend on the model.
    """

    mean: Tensor
    std_N: Tensor


def denoising_step(
    sampler: Sampler,
    velocity: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    noise_level: float,
    *,
    sigma_max: float | None = None,
) -> DenoisingStep:
    """The Gaussian of the next latent under a sampler named by a word; see the function of that name.

    Args:
        sampler: `sde`, `cps` or `dance_sde`.
        velocity: The model's velocity, [N, ...], any float dtype.
        latents: The latents that it was predicted at, of the same shape.
        sigmas: Noise level of the latents, [N], more than 0 and at most 1.
        next_sigmas: That of the next latents, [N], at least 0 and below `sigmas`.
        noise_level: The sampler's own factor, dimensionless, positive.
        sigma_max: The schedule's second sigma; `sde` needs it where a sigma is 1.

    Raises:
        UserError: Inputs that do not fit, or a step that is certain: without noise the KL of two steps is infinite.

    Example:
        >>> from torch import tensor
        >>> from retort.flows import denoising_step
        >>> step = denoising_step("dance_sde", tensor([[1.0]]), tensor([[2.0]]), tensor([0.5]), tensor([0.25]), 0.2)
        >>> step.mean, step.std_N  # 2 - 0.25 * (1 + 0.04 * 2.5), and 0.2 * sqrt(0.25)
        (tensor([[1.7250]]), tensor([0.1000]))
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; {did_you_mean(sampler, SAMPLERS)}")
    return SAMPLERS[sampler](velocity, latents, sigmas, next_sigmas, noise_level, sigma_max=sigma_max)


def decided_step(
    noise: Noise | Straight, velocity: Tensor, latents: Tensor, sigmas: Tensor, next_sigmas: Tensor
) -> DenoisingStep:
    """The Gaussian of what the steps of a trajectory decided.

    Args:
        noise: How they did.
        velocity: As in `denoising_step`.
        latents: As there.
        sigmas: As there.
        next_sigmas: As there.

    Raises:
        UserError: As there.
    """
    match noise:
        case Noise(sampler, level, sigma_max):
            return denoising_step(sampler, velocity, latents, sigmas, next_sigmas, level, sigma_max=sigma_max)
        case Straight():
            return straight(velocity, latents, sigmas, next_sigmas)


def straight(velocity: Tensor, latents: Tensor, sigmas: Tensor, next_sigmas: Tensor) -> DenoisingStep:
    r"""The step of an example, :math:`N(x + v d,\ \tfrac D2 d^2 I)` with the step d in sigma and D elements.

    Of two velocities its KL is :math:`\Vert v - u \Vert^2 / D`, their mean square difference, at every sigma. So an
    example at :math:`x = (1-\sigma) x_0 + \sigma \epsilon` whose next latent is the data :math:`x_0` is worth
    :math:`\Vert v - (\epsilon - x_0) \Vert^2 / D`, the loss of flow matching.

    Args:
        velocity: As in `denoising_step`.
        latents: As there.
        sigmas: As there.
        next_sigmas: As there; usually 0.

    Raises:
        UserError: As there.
    """
    v, x, sigma_N, next_N = _checked(velocity, latents, sigmas, next_sigmas, 1.0)
    step_N = next_N - sigma_N
    return DenoisingStep(x + v * _over(step_N, x), step_N.abs() * math.sqrt(0.5 * x[0].numel()))


def sde(
    velocity: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    noise_level: float,
    *,
    sigma_max: float | None = None,
) -> DenoisingStep:
    r"""The sampler of Flow-GRPO and Flow-OPD: :math:`s = a \sqrt{\sigma / (1 - \sigma)}` with the noise level a.

    At :math:`\sigma = 1` that is infinite, so `sigma_max`, the schedule's second sigma, takes the place of sigma in the
    denominator. A step to :math:`\sigma_{next} = 0` has noise as any other: its latents are images with some noise left
    (released code trains on all steps but that one).

    Released code calls s the standard deviation and divides squared differences by :math:`2 s^2`, so it has |d| times
    the KL; here the standard deviation is that of the step.

    Args:
        velocity: As in `denoising_step`.
        latents: As there.
        sigmas: As there.
        next_sigmas: As there.
        noise_level: a (0.7 in Flow-OPD).
        sigma_max: The schedule's second sigma, strictly between 0 and 1; needed where a sigma is 1.

    Raises:
        UserError: As there; or a sigma of 1 without `sigma_max`.
    """
    v, x, sigma_N, next_N = _checked(velocity, latents, sigmas, next_sigmas, noise_level)
    if sigma_max is not None and not 0.0 < sigma_max < 1.0:
        raise UserError(
            f"sigma_max must lie strictly between 0 and 1, not {sigma_max}; it is the schedule's second sigma"
        )
    if sigma_max is None and bool((sigma_N == 1).any()):
        row = int((sigma_N == 1).nonzero()[0])
        raise UserError(
            f"sigma is 1 (row {row}), where the noise of sampler 'sde' is infinite; give sigma_max=, the schedule's "
            "second sigma"
        )
    below_N = sigma_N if sigma_max is None else sigma_N.masked_fill(sigma_N == 1, sigma_max)
    return _integrated(v, x, sigma_N, next_N, noise_level * (sigma_N / (1.0 - below_N)).sqrt())


def dance_sde(
    velocity: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    noise_level: float,
    *,
    sigma_max: float | None = None,
) -> DenoisingStep:
    r"""The sampler of DanceGRPO: :math:`s = \eta`, the same at every step.

    :math:`\sigma = 1` needs nothing. A step to :math:`\sigma_{next} = 0` has noise as any other.

    Args:
        velocity: As in `denoising_step`.
        latents: As there.
        sigmas: As there.
        next_sigmas: As there.
        noise_level: eta.
        sigma_max: Not needed.

    Raises:
        UserError: As there.
    """
    v, x, sigma_N, next_N = _checked(velocity, latents, sigmas, next_sigmas, noise_level)
    return _integrated(v, x, sigma_N, next_N, torch.full_like(sigma_N, noise_level))


def cps(
    velocity: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    noise_level: float,
    *,
    sigma_max: float | None = None,
) -> DenoisingStep:
    r"""Coefficient-preserving sampling: part of the predicted noise is replaced by new noise of the same size.

    .. math:: std = \sigma_{next} \sin(a\pi/2), \quad
              \mu = (1-\sigma_{next})(x - \sigma v) + \sqrt{\sigma_{next}^2 - std^2}\,(x + (1-\sigma) v)

    :math:`\sigma = 1` needs nothing. A step to :math:`\sigma_{next} = 0` has no noise left and is refused: leave the
    last step of a trajectory out.

    Args:
        velocity: As in `denoising_step`.
        latents: As there.
        sigmas: As there.
        next_sigmas: As there.
        noise_level: a, at most 1, where all of the noise is new.
        sigma_max: Not needed.

    Raises:
        UserError: As there; or a noise level above 1.
    """
    v, x, sigma_N, next_N = _checked(velocity, latents, sigmas, next_sigmas, noise_level)
    if noise_level > 1.0:
        raise UserError(
            f"noise_level of sampler 'cps' must be at most 1, where all noise is new; it is {noise_level:g}"
        )
    if bool((next_N == 0).any()):
        row = int((next_N == 0).nonzero()[0])
        raise UserError(
            f"next sigma is 0 (row {row}), where sampler 'cps' adds no noise, so the KL of two steps is infinite; "
            "leave the last step of each trajectory out"
        )
    std_N = next_N * math.sin(0.5 * math.pi * noise_level)
    kept_N = next_N * math.cos(0.5 * math.pi * noise_level)
    clean, noise = x - _over(sigma_N, x) * v, x + _over(1.0 - sigma_N, x) * v
    return DenoisingStep(_over(1.0 - next_N, x) * clean + _over(kept_N, x) * noise, std_N)


class _Step(Protocol):
    def __call__(
        self,
        velocity: Tensor,
        latents: Tensor,
        sigmas: Tensor,
        next_sigmas: Tensor,
        noise_level: float,
        *,
        sigma_max: float | None = None,
    ) -> DenoisingStep: ...


#: The samplers by name.
SAMPLERS: Mapping[str, _Step] = {
    "sde": sde,
    "cps": cps,
    "dance_sde": dance_sde,
}


def _integrated(v: Tensor, x: Tensor, sigma_N: Tensor, next_N: Tensor, noise_N: Tensor) -> DenoisingStep:
    """One Euler-Maruyama step with the noise s per unit of sigma."""
    step_N = next_N - sigma_N
    pull_N = noise_N.square() / (2.0 * sigma_N)
    mean = x + (v + _over(pull_N, x) * (x + _over(1.0 - sigma_N, x) * v)) * _over(step_N, x)
    return DenoisingStep(mean, noise_N * step_N.abs().sqrt())


def _over(values_N: Tensor, latents: Tensor) -> Tensor:
    """A number per row, shaped to be multiplied with latents."""
    return values_N.reshape(-1, *(1 for _ in latents.shape[1:]))


def _checked(
    velocity: Tensor, latents: Tensor, sigmas: Tensor, next_sigmas: Tensor, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs in the dtype of the computation, on one device."""
    if latents.ndim < 2 or velocity.shape != latents.shape:
        raise UserError(
            f"velocity and latents must both be [N, ...], one row per step, not {tuple(velocity.shape)} and "
            f"{tuple(latents.shape)}"
        )
    for name, values in {"sigmas": sigmas, "next_sigmas": next_sigmas}.items():
        if values.shape != latents.shape[:1] or not values.is_floating_point():
            raise UserError(f"{name} must be floats [N] = ({len(latents)},), not {tuple(values.shape)} {values.dtype}")
    if not (math.isfinite(noise_level) and noise_level >= 0.0):
        raise UserError(f"noise_level must be a positive number, not {noise_level}")
    if noise_level == 0.0:
        raise UserError(
            "noise_level is 0: without noise a step is certain, and the KL of two steps is infinite wherever their "
            "velocities differ; give a positive noise level"
        )
    ordered_N = (next_sigmas >= 0) & (next_sigmas < sigmas) & (sigmas <= 1)
    if not bool(ordered_N.all()):
        row = int((~ordered_N).nonzero()[0])
        raise UserError(
            f"row {row} steps from sigma {float(sigmas[row]):g} to {float(next_sigmas[row]):g}; sigma must fall, from "
            "at most 1 (noise) to at least 0 (data)"
        )
    v, x = as_compute(velocity), as_compute(latents).detach()
    kind = torch.promote_types(v.dtype, x.dtype)
    sigma_N, next_N = (values.to(device=x.device, dtype=kind) for values in (sigmas, next_sigmas))
    return v.to(kind), x.to(kind), sigma_N, next_N
