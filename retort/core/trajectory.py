"""What a flow model decided from noise to data: its latents, in the place of tokens. Axis letters: see `retort.core`.

A trajectory is a sequence like a text's: its first state, noise, is given; each later one is decided by the step
before, or computed without noise and so no decision. Whoever packs, counts, groups or divides rollouts reads the action
mask, and no latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from retort.core.sequences import Media, TokenSequence
from retort.core.steps import NO_TOKEN

#: How a denoising step adds noise; see `retort.flows.samplers`.
Sampler = Literal["sde", "cps", "dance_sde"]


@dataclass(frozen=True)
class Noise:
    """How the decided steps of a trajectory add noise.

    Attributes:
        sampler: `sde`, `cps` or `dance_sde`.
        level: The sampler's own factor, dimensionless, positive.
        sigma_max: The schedule's second sigma, which `sde` needs where a sigma is 1.
    """

    sampler: Sampler
    level: float
    sigma_max: float | None = None


@dataclass(frozen=True)
class Straight:
    """How a decided step goes on where it was not sampled by a student but is an example: straight to its end.

    Its deviation is the size of the step times sqrt(D / 2), with D elements of a latent. With it the KL of two models
    is the mean square of the difference of their velocities, the loss of flow matching; nothing is drawn by it.
    """


@dataclass(frozen=True, eq=False)
class Trajectory(TokenSequence):
    """The states of one sample from noise to data, L of them, and which steps decided the next one.

    Attributes:
        latents: All states, [L, ...], on the CPU, fp32 (float64 of a model in float64); the first is noise, the last is
            data.
        sigmas_L: Noise level of each state, float64, falling; of examples it falls from every second one to 0.
        noise: How the decided steps add noise, or that they are those of an example; None where none is decided.

    Raises:
        ValueError: Tensors of different lengths, or decided steps without noise.

    Example:
        >>> import torch
        >>> from retort.core.trajectory import Noise, Trajectory
        >>> states, sigmas = torch.zeros(3, 2), torch.tensor([1.0, 0.5, 0.0])
        >>> path = Trajectory.of_states(states, sigmas, torch.tensor([True, False]), Noise("cps", 0.8))
        >>> path.steps, path.actions_A.tolist()  # one decision, and no token
        (1, [-1])
    """

    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    sigmas_L: Tensor = field(default_factory=lambda: torch.empty(0))
    noise: Noise | Straight | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.latents) != len(self) or self.sigmas_L.shape != self.tokens_L.shape:
            shapes = f"{tuple(self.latents.shape)} and {tuple(self.sigmas_L.shape)}"
            raise ValueError(f"a trajectory of {len(self)} states has latents and sigmas of shape {shapes}")
        if self.noise is None and self.steps:
            raise ValueError("a step without noise decides nothing")

    @staticmethod
    def of_states(latents: Tensor, sigmas_L: Tensor, decided: Tensor, noise: Noise | Straight | None) -> Trajectory:
        """Builds it.

        Args:
            latents: All states, [L, ...].
            sigmas_L: Their noise levels.
            decided: For each of the L - 1 steps, whether it added noise, bool.
            noise: How.
        """
        tokens_L = torch.full((len(latents),), NO_TOKEN, dtype=torch.long)
        mask_L = torch.cat([torch.zeros(1, dtype=torch.bool), decided.bool()])
        return Trajectory(tokens_L, mask_L, (), latents, sigmas_L.double(), noise)

    @property
    def from_A(self) -> Tensor:
        """Places in L of the states from which the A decided steps begin, int64; each leads to the next place."""
        return self.action_mask_L.nonzero().flatten() - 1

    @property
    def last(self) -> Tensor:
        """The last state, [...]: the sample."""
        return self.latents[-1]

    @property
    def key(self) -> tuple[bytes, tuple[tuple[str, int], ...]]:
        """The identity of a trajectory: its latents, since all have the same tokens."""
        return self.latents.detach().cpu().contiguous().numpy().tobytes(), ()

    def part(self, start: int, end: int) -> TokenSequence:
        """A trajectory is one decision process; it is never cut.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"a trajectory of {len(self)} states cannot be cut to {start}..{end}")

    def then(self, ids: Sequence[int], *, decided: bool = False, media: tuple[Media, ...] = ()) -> TokenSequence:
        """No token follows a sample.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a trajectory ends with its sample; no token follows it")

    def with_prefix(self, prefix: TokenSequence) -> TokenSequence:
        """A trajectory begins with noise, behind no other context.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a trajectory begins with noise; nothing can be put before it")
