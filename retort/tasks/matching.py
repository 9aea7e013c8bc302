"""How the models of the built-in flow tasks are trained and sampled: flow matching, and Euler steps.

Flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023) is regression: at :math:`x = (1-t) x_0 + t e` the
velocity to predict is :math:`e - x_0`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort.flows.small import SmallFlow

#: Draws a batch of so many samples: latents [N, ...], and the prompt of each.
Batch = Callable[[int, torch.Generator], tuple[Tensor, Sequence[str]]]
#: How often a prompt is left out, so that a model knows the unconditional prompt, too.
DROPPED = 0.1


@dataclass(frozen=True)
class Fit:
    """One stage of flow matching.

    Attributes:
        steps: Optimizer steps.
        batch: Samples per step.
        lr: Highest learning rate of AdamW; a cosine decays it to zero.
        seed: Seed of data, noise and noise levels.
    """

    steps: int
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0

    def other(self, seed: int) -> Fit:
        """The same with other random numbers; with itself for seed 0."""
        return replace(self, seed=self.seed + 1000 * seed)


def fit(flow: SmallFlow, draw: Batch, how: Fit, *, name: str = "") -> None:
    """Trains a model in place.

    Args:
        flow: The model.
        draw: Where samples and prompts come from.
        how: For how long, and how fast.
        name: What the progress lines call it; nothing is printed without.
    """
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(flow.module.parameters(), lr=how.lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, mean = time.monotonic(), 0.0
    for step in range(1, how.steps + 1):
        rate = how.lr * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * (step - 1) / how.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        data, texts = draw(how.batch, generator)
        kept = torch.rand(len(texts), generator=generator) >= DROPPED
        asked = flow.condition([text if there else "" for text, there in zip(texts, kept.tolist(), strict=True)])
        noise = torch.randn(data.shape, generator=generator)
        sigmas_N = torch.rand(len(data), generator=generator)
        over = sigmas_N.reshape(-1, *(1 for _ in data.shape[1:]))
        predicted = flow.velocity((1 - over) * data + over * noise, sigmas_N, asked)
        loss = (predicted - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.module.parameters(), 1.0)
        optimizer.step()
        mean = 0.99 * mean + 0.01 * loss.item()
        if name and (step % 500 == 0 or step == how.steps):
            spent = time.monotonic() - start
            print(
                f"  {name}: step {step} of {how.steps}, {spent:.0f} s, loss {mean / (1 - 0.99**step):.4f}", flush=True
            )


@torch.no_grad()
def sampled(flow: SmallFlow, texts: Sequence[str], *, steps: int = 20, seed: int = 0, batch: int = 256) -> Tensor:
    """Samples without noise on the way, decoded, [N, ...]; sample n has the same first state for every model.

    Args:
        flow: The model.
        texts: The prompt of each sample.
        steps: Euler steps.
        seed: Seed of the first states.
        batch: Samples per forward pass.
    """
    latents = torch.randn(len(texts), *flow.latent_shape, generator=torch.Generator().manual_seed(seed))
    sigmas = flow.sigmas(steps).float()
    found: list[Tensor] = []
    for start in range(0, len(texts), batch):
        x, asked = latents[start : start + batch], flow.condition(texts[start : start + batch])
        for now, then in itertools.pairwise(sigmas):
            x = x + (then - now) * flow.velocity(x, now.expand(len(x)), asked)
        found.append(flow.decoded(x))
    return torch.cat(found)
