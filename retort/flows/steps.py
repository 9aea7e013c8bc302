"""The decided steps of trajectories, end to end, and what a model says of each. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort.core.distribution import as_compute
from retort.core.gaussian import Gaussian
from retort.core.rollouts import Rollout
from retort.core.trajectory import Noise, Straight, Trajectory
from retort.errors import UserError
from retort.flows.model import FlowModel
from retort.flows.samplers import DenoisingStep, decided_step


@dataclass(frozen=True, eq=False)
class DecidedSteps:
    """N decided steps: where each began, where it arrived, and what for.

    Attributes:
        latents: Latents from which the steps began, [N, ...].
        next_latents: Latents at which they arrived, [N, ...].
        sigmas_N: Noise levels of `latents`, float64, on the CPU.
        next_sigmas_N: Those of `next_latents`, float64, on the CPU.
        texts: The prompt of each step.
        noise: How all of them added noise, or that they are those of examples.
    """

    latents: Tensor
    next_latents: Tensor
    sigmas_N: Tensor
    next_sigmas_N: Tensor
    texts: tuple[str, ...]
    noise: Noise | Straight

    @staticmethod
    def of(trajectories: Sequence[Trajectory], texts: Sequence[str]) -> DecidedSteps:
        """The decided steps of some trajectories, in order.

        Args:
            trajectories: At least one of them with a decided step.
            texts: The prompt of each.

        Raises:
            UserError: They add noise in different ways, or nothing was decided.
        """
        ways = list(dict.fromkeys(own.noise for own in trajectories if own.noise is not None and own.steps))
        if len(ways) != 1:
            several = f"add noise in {len(ways)} ways ({ways[0]}; {ways[1]})" if ways else "decide no step"
            raise UserError(f"these trajectories {several}; steps that are learnt together add noise in one way")
        begins = [own.from_A for own in trajectories]
        rows = list(zip(trajectories, begins, strict=True))
        return DecidedSteps(
            torch.cat([own.latents[from_A] for own, from_A in rows]),
            torch.cat([own.latents[from_A + 1] for own, from_A in rows]),
            torch.cat([own.sigmas_L[from_A] for own, from_A in rows]),
            torch.cat([own.sigmas_L[from_A + 1] for own, from_A in rows]),
            tuple(text for text, from_A in zip(texts, begins, strict=True) for _ in range(len(from_A))),
            ways[0],
        )

    @staticmethod
    def of_rollouts(rollouts: Sequence[Rollout]) -> DecidedSteps:
        """The decided steps of some rollouts, as `Pack.of` lays them; the text of each is its prompt's.

        Raises:
            UserError: As `of`; or a rollout decided tokens.
        """
        trajectories: list[Trajectory] = []
        for rollout in rollouts:
            trajectories += [own for own in rollout.sequences if isinstance(own, Trajectory)]
            if len(rollout.sequences) != 1 or not isinstance(rollout.sequences[0], Trajectory):
                raise UserError(
                    f"prompt '{rollout.prompt.id}': its rollout is no trajectory of latents; a flow model scores "
                    "denoising steps and no tokens"
                )
        return DecidedSteps.of(trajectories, [rollout.prompt.text for rollout in rollouts])

    def __len__(self) -> int:
        """N, the number of steps."""
        return len(self.latents)

    @property
    def decided_ND(self) -> Tensor:
        """What was decided: the next latents, flattened, fp32 or float64."""
        return as_compute(self.next_latents).flatten(1)

    def select(self, index_N: Tensor) -> DecidedSteps:
        """Some of the steps, in the order given."""
        own, on_cpu = index_N.to(self.latents.device), index_N.cpu()
        numbers: list[int] = on_cpu.tolist()  # pyright: ignore
        return DecidedSteps(
            self.latents[own],
            self.next_latents[own],
            self.sigmas_N[on_cpu],
            self.next_sigmas_N[on_cpu],
            tuple(self.texts[number] for number in numbers),
            self.noise,
        )

    def to(self, device: torch.device | str) -> DecidedSteps:
        """The same with its latents on a device."""
        return replace(self, latents=self.latents.to(device), next_latents=self.next_latents.to(device))


def step_of(model: FlowModel, steps: DecidedSteps) -> DenoisingStep:
    """The model's Gaussian of each next latent, on its device.

    Args:
        model: Predicts the velocities.
        steps: The steps; they are moved to the model.

    Returns:
        The mean, [N, ...], differentiable in the model's parameters, and the standard deviations, [N].
    """
    latents = steps.latents.to(model.device)
    v = model.velocity(latents, steps.sigmas_N, steps.texts)
    return decided_step(steps.noise, v, latents, steps.sigmas_N, steps.next_sigmas_N)


@torch.no_grad()
def gaussian_of(model: FlowModel, steps: DecidedSteps, *, batch: int) -> Gaussian:
    """The model's Gaussians at all steps, without gradient, on the CPU.

    Args:
        model: Predicts the velocities.
        steps: The steps, at least one.
        batch: Steps per forward pass.

    Raises:
        SignalError: A mean is not finite.
    """
    index_N = torch.arange(len(steps))
    found = [step_of(model, steps.select(index_N[start : start + batch])) for start in range(0, len(steps), batch)]
    mean_ND = torch.cat([own.mean.flatten(1).cpu() for own in found])
    return Gaussian(mean_ND, torch.cat([own.std_N.cpu() for own in found]), model.name)
