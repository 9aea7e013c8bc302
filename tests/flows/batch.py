"""A batch of denoising steps for any method, float64: two models that are linear in a latent, on trajectories."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retort.core.losses import TokenLosses
from retort.flows import Sampler, denoising_step
from retort.functional import flow_losses
from retort.method import Method

F64 = torch.float64
SAMPLERS: tuple[Sampler, ...] = ("sde", "cps", "dance_sde")
#: Two prompts of two and three trajectories, each with a success and a failure.
GROUPS = torch.tensor([0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=F64)
NOISE = 0.6


class Flow:
    """Five trajectories of four steps, from sigma 0.9 to 0.1, on latents of 2 x 3."""

    def __init__(self, sampler: Sampler = "sde", *, trajectories: int = 5, apart: float = 0.3, seed: int = 0) -> None:
        """Takes the student's own steps.

        Args:
            sampler: By which it takes them.
            trajectories: How many.
            apart: Distance of the other models from it.
            seed: Of weights and noise.
        """
        self.draw = torch.Generator().manual_seed(seed)
        self.sampler: Sampler = sampler
        self.weights = self.normal(6, 6).requires_grad_()
        self.others = {
            name: (self.weights.detach() + apart * self.normal(6, 6)).requires_grad_()
            for name in ("teacher", "base", "anchor")
        }
        grid = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=F64)
        latents, rows = self.normal(trajectories, 2, 3), list[tuple[Tensor, Tensor]]()
        for start, then in pairwise(grid):
            new = self.decide(latents, start.expand(trajectories), then.expand(trajectories))
            rows.append((latents, new))
            latents = new
        self.latents, self.next_latents = (torch.stack(each, 1).flatten(0, 1) for each in zip(*rows, strict=True))
        self.sigmas, self.next_sigmas = grid[:-1].repeat(trajectories), grid[1:].repeat(trajectories)
        self.rollouts = torch.arange(trajectories).repeat_interleave(4)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=F64)

    @torch.no_grad()
    def decide(self, latents: Tensor, sigmas: Tensor, next_sigmas: Tensor) -> Tensor:
        """Next latents that the student arrives at."""
        mean, std_N = denoising_step(self.sampler, velocity(self.weights, latents), latents, sigmas, next_sigmas, NOISE)
        return mean + std_N[:, None, None] * self.normal(*latents.shape)

    def losses(self, method: Method | str, *, same: bool = False, **changes: Any) -> TokenLosses:
        """The method on all steps; with `same`, every view says what the student says."""
        views = {
            name: velocity(self.weights if same else weights, self.latents) for name, weights in self.others.items()
        }
        given: dict[str, Any] = {
            "student_velocity": velocity(self.weights, self.latents),
            "teacher_velocity": views.pop("teacher"),
            "latents": self.latents,
            "next_latents": self.next_latents,
            "sigmas": self.sigmas,
            "next_sigmas": self.next_sigmas,
            "sampler": self.sampler,
            "noise_level": NOISE,
            "rollouts": self.rollouts,
            "groups": GROUPS,
            "rewards": REWARDS,
            "extra_views": views,
        }
        return flow_losses(method, **given | changes)

    def gradient(self, losses: TokenLosses) -> Tensor:
        """Of the loss, with respect to the student's weights."""
        return torch.autograd.grad(losses.loss, self.weights)[0]


def velocity(weights: Tensor, latents: Tensor) -> Tensor:
    """That of a model that is linear in the latent."""
    return (latents.flatten(1) @ weights.T).reshape(latents.shape)
