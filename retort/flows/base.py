"""The protocol of velocity models: what student and teacher of a flow run are. Axis letters: see `retort.core`.

A plain `nn.Module` with these methods is one. The contract of all of them is `tests/contracts/test_velocity.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Condition:
    """What a velocity model reads of some prompts.

    Attributes:
        tensors: Tensors by name, each [n, ...] with one row per prompt.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """n, the number of prompts."""
        return len(next(iter(self.tensors.values())))

    def rows(self, index_N: Tensor) -> Condition:
        """The rows of some prompts, in the order given; one may be there several times."""
        return Condition({name: values[index_N.to(values.device)] for name, values in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """The same on a device."""
        return Condition({name: values.to(device) for name, values in self.tensors.items()})

    @staticmethod
    def joined(parts: Sequence[Condition]) -> Condition:
        """The rows of several, one after another."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@runtime_checkable
class VelocityModel(Protocol):
    """A flow-matching model: it predicts the velocity of a latent at a noise level, for a prompt.

    Attributes:
        module: What learns: its parameters, and their names in a checkpoint. Text encoders and decoders are no part.
        latent_shape: Shape of one latent.
        identity: What two models must share to be compared step by step, in words by name: at least `architecture`
            (family and latents) and `schedule` (what makes the noise levels).
    """

    module: nn.Module
    latent_shape: tuple[int, ...]

    @property
    def identity(self) -> Mapping[str, str]:
        """See above."""
        ...

    def condition(self, texts: Sequence[str]) -> Condition:
        """What it reads of some prompts; the empty text is the prompt of guidance's other side.

        Raises:
            UserError: A text that it cannot read.
        """
        ...

    def velocity(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Tensor:
        """Predicts noise minus data.

        Args:
            latents: [N, ...], on the module's device.
            sigmas_N: Their noise levels, from 0 (data) to 1 (noise).
            condition: One row for each.

        Returns:
            [N, ...], differentiable in the module's parameters.
        """
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The noise levels of so many steps: float64 [steps + 1], falling, from at most 1 to 0."""
        ...

    def decoded(self, latents: Tensor) -> Tensor:
        """Samples out of latents without noise, [N, ...]: images [N, 3, H, W] from 0 to 1 where it makes images."""
        ...

    def save(self, folder: Path) -> None:
        """Writes it into an empty folder, as `retort.flows.load.open_flow` opens it."""
        ...


@runtime_checkable
class ChecksTexts(Protocol):
    """A velocity model that can tell at no cost which prompts it cannot read, so that a run need not begin with one."""

    def check_texts(self, texts: Sequence[str]) -> None:
        """Reads prompts, and keeps nothing of them.

        Raises:
            UserError: As `VelocityModel.condition`.
        """
        ...
