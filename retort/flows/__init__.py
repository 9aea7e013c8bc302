"""Flow matching: denoising steps as decisions. A step's next latent takes the place of a token.

`denoising_step` makes a Gaussian of a velocity, under one of three samplers. `flow_opd` and `diffusion_opd` make the
methods that were published for it; `retort.functional.flow_losses` applies any method that needs no vocabulary.

No run trains a flow model yet: there is no student, no engine and no data for it, so `retort train` does not know these
methods. Their loss can be used in other trainers.
"""

from retort.flows.methods import METHODS, diffusion_opd, flow_opd
from retort.flows.samplers import DenoisingStep, Sampler, cps, dance_sde, denoising_step, sde

__all__ = [
    "METHODS",
    "DenoisingStep",
    "Sampler",
    "cps",
    "dance_sde",
    "denoising_step",
    "diffusion_opd",
    "flow_opd",
    "sde",
]
