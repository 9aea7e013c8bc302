"""Flow matching: denoising steps as decisions. A step's next latent takes the place of a token.

`denoising_step` makes a Gaussian of a velocity, under one of three samplers; `retort.functional.flow_losses` applies
any method that needs no vocabulary. `VelocityModel` is what student and teacher are.
"""

from retort.core.trajectory import Noise, Sampler, Trajectory
from retort.flows.base import Condition, VelocityModel
from retort.flows.model import FlowModel
from retort.flows.samplers import DenoisingStep, cps, dance_sde, denoising_step, sde

__all__ = [
    "Condition",
    "DenoisingStep",
    "FlowModel",
    "Noise",
    "Sampler",
    "Trajectory",
    "VelocityModel",
    "cps",
    "dance_sde",
    "denoising_step",
    "sde",
]
