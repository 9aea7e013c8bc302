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


def example(sample: Tensor, key: Key, *, count: int = 1) -> Trajectory:
    r"""Steps from between noise and a sample straight to the sample, :math:`(1-\sigma) x_0 + \sigma \epsilon` to x0.

    The velocity that each asks for is :math:`\epsilon - x_0`. Sigma is uniform from `LEAST_SIGMA` to 1 and epsilon
    standard normal. The sources of the methods state no distribution of sigma; this is the plain one.

    Args:
        sample: x0, [...], a latent without noise.
        key: Of the draws of sigmas and epsilons; it may be the key of the sample's own noise.
        count: Number of steps. They are one trajectory, of which every second state is the sample.

    Example:
        >>> import torch
        >>> from retort.flows.examples import example
        >>> path = example(torch.tensor([1.0, 2.0]), (0, "teacher", "a prompt", 0), count=3)
        >>> path.steps, path.last, path.sigmas_L[1::2].tolist()
        (3, tensor([1., 2.]), [0.0, 0.0, 0.0])
    """
    sigma_A = 1.0 - (1.0 - LEAST_SIGMA) * uniforms(*key, "example", "sigma", count=count)
    draw = generator(*key, "example", "noise")
    noise = torch.randn(count, *sample.shape, generator=draw, dtype=torch.float32).to(sample.dtype)
    at = sigma_A.reshape(-1, *(1 for _ in sample.shape)).to(sample.dtype)
    between = (1.0 - at) * sample + at * noise
    states = torch.stack([between, sample.expand_as(between)], 1).flatten(0, 1)
    sigmas_L = torch.stack([sigma_A, torch.zeros_like(sigma_A)], 1).flatten()
    return Trajectory.of_states(states, sigmas_L, torch.arange(2 * count - 1) % 2 == 0, Straight())


def examples(
    models: Sequence[FlowModel],
    requests: Sequence[FlowRequest],
    keys: Sequence[Key],
    *,
    count: int,
    steps: int,
    batch: int,
) -> list[Trajectory]:
    """Examples out of samples that teachers make without noise on the way.

    Args:
        models: The teacher of each request: its expert, where prompts have experts. Each makes its own samples alone.
        requests: What is asked for; keys of windows are not read.
        keys: Of the draws of each example, see `example`.
        count: Steps out of each sample.
        steps: Denoising steps of a sample.
        batch: Latents per forward pass.

    Returns:
        A trajectory for each request, in order, on the CPU.

    Raises:
        RunError: A sample is not finite.
    """
    made: dict[int, Tensor] = {}
    for model in {id(own): own for own in models}.values():
        own = [place for place, asked in enumerate(models) if asked is model]
        found = samples(model, [requests[place] for place in own], steps=steps, batch=batch)
        made |= dict(zip(own, found, strict=True))
    return [example(made[place], key, count=count) for place, key in enumerate(keys)]
