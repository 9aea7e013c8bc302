"""Published methods that teach denoising steps, one file each. Values only.

The example of each method follows these lines. In it, steps from sigma 0.5 to 0.25 under the sampler "dance_sde" at
noise level 0.5 have a standard deviation of 0.25:

>>> from retort.flows import diffusion_opd, flow_opd
>>> from retort.functional import flow_losses
>>> from torch import tensor
>>> given = {
...     "latents": tensor([[0.0], [0.0]]),
...     "next_latents": tensor([[0.1], [-0.2]]),
...     "sigmas": tensor([0.5, 0.5]),
...     "next_sigmas": tensor([0.25, 0.25]),
...     "sampler": "dance_sde",
...     "noise_level": 0.5,
... }
"""

from collections.abc import Callable, Mapping

from retort.flows.methods.diffusion_opd import diffusion_opd
from retort.flows.methods.flow_opd import flow_opd
from retort.method import Method

#: The functions that make them, by name.
METHODS: Mapping[str, Callable[..., Method]] = {"diffusion_opd": diffusion_opd, "flow_opd": flow_opd}

__all__ = ["METHODS", "diffusion_opd", "flow_opd"]
