"""Published methods, one file each: the function `x` in `x.py` makes the method `x`. Values only.

The example of each method follows these lines; logits are logarithms of probabilities, so that it can be checked by
hand:

>>> import retort
>>> from retort.functional import flow_losses, token_losses
>>> from torch import tensor

Methods of denoising steps are given two of them, from sigma 0.5 to 0.25, under a sampler with which the next latent has
a standard deviation of 0.25:

>>> two_steps = {
...     "latents": tensor([[0.0], [0.0]]),
...     "next_latents": tensor([[0.1], [-0.2]]),
...     "sigmas": tensor([0.5, 0.5]),
...     "next_sigmas": tensor([0.25, 0.25]),
...     "sampler": "dance_sde",
...     "noise_level": 0.5,
... }
"""
