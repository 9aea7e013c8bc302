"""Samples of a teacher as trajectories to learn from: the cold start of a flow model. Axis letters: see `retort.core`.

For a text, supervised fine-tuning is on the tokens that a teacher wrote. For a flow it is on the data that a teacher
made: a state on the way from noise to a sample, and the sample as what was decided there. The same loss learns both
(`retort.divergences.negative_log_likelihood`); of an example it is the mean square error of the velocity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.core.random_streams import generator, uniforms
from retort.core.trajectory import Straight, Trajectory
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowRequest, Key, samples

#: The least noise level of an example. Below it the velocity, a difference divided by sigma, is rounding in fp32.
LEAST_SIGMA = 1e-3


def example(sample: Tensor, key: Key) -> Trajectory:
    r"""A step from between noise and a sample straight to the sample, :math:`(1-\sigma) x_0 + \sigma \epsilon` to x0.

    The velocity that it asks for is :math:`\epsilon - x_0`. Sigma is uniform from `LEAST_SIGMA` to 1 and epsilon
    standard normal. The sources of the methods state no distribution of sigma; this is the plain one.

    Args:
        sample: x0, [...], a latent without noise.
        key: Of the draws of sigma and epsilon.

    Example:
        >>> import torch
        >>> from retort.flows.examples import example
        >>> path = example(torch.tensor([1.0, 2.0]), (0, "teacher", "a prompt", 0))
        >>> path.steps, path.last, float(path.sigmas_L[-1])
        (1, tensor([1., 2.]), 0.0)
    """
    sigma = 1.0 - (1.0 - LEAST_SIGMA) * float(uniforms(*key, "sigma", count=1))
    noise = torch.randn(sample.shape, generator=generator(*key, "noise"), dtype=torch.float32).to(sample.dtype)
    between = (1.0 - sigma) * sample + sigma * noise
    return Trajectory.of_states(
        torch.stack([between, sample]), torch.tensor([sigma, 0.0], dtype=torch.float64), torch.ones(1), Straight()
    )


def examples(
    models: Sequence[FlowModel], requests: Sequence[FlowRequest], keys: Sequence[Key], *, steps: int, batch: int
) -> list[Trajectory]:
    """Examples out of samples that teachers make without noise on the way.

    A teacher is asked for its own requests alone. Requests to one teacher with the same text and the same key of noise
    are one sample, which is made once; so several examples of it, each with a sigma of its own, cost no more.

    Args:
        models: The teacher of each request: its expert, where prompts have experts.
        requests: What is asked for; keys of windows are not read.
        keys: Of the draws of each example, see `example`.
        steps: Denoising steps of a sample.
        batch: Latents per forward pass.

    Returns:
        A trajectory of two states for each request, in order, on the CPU.

    Raises:
        RunError: A sample is not finite.
    """
    made: dict[tuple[int, str, Key], Tensor] = {}
    for model in {id(own): own for own in models}.values():
        own = {
            (id(model), request.text, request.noise): request
            for asked, request in zip(models, requests, strict=True)
            if asked is model
        }
        made |= dict(zip(own, samples(model, list(own.values()), steps=steps, batch=batch), strict=True))
    asked = zip(models, requests, keys, strict=True)
    return [example(made[id(model), request.text, request.noise], key) for model, request, key in asked]
