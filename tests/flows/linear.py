"""A tiny velocity model: a linear map of the latent, with an offset that depends on the length of the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from retort.flows import Condition, FlowModel

F64 = torch.float64


class Linear:
    """v = W x + b sigma + c (length of the text)."""

    def __init__(self, shape: tuple[int, ...] = (2, 3), *, seed: int = 0, schedule: str = "linear") -> None:
        draw = torch.Generator().manual_seed(seed)
        width = torch.Size(shape).numel()
        self.latent_shape, self.schedule = shape, schedule
        self.encoded: list[str] = []
        self.rows: list[int] = []
        self.module = nn.Linear(width, width, dtype=F64)
        self.module.register_parameter("of_text", nn.Parameter(torch.randn(width, generator=draw, dtype=F64)))
        with torch.no_grad():
            self.module.weight.copy_(0.3 * torch.randn(width, width, generator=draw, dtype=F64))
            self.module.bias.copy_(torch.randn(width, generator=draw, dtype=F64))

    @property
    def identity(self) -> dict[str, str]:
        return {"architecture": f"linear of {self.latent_shape}", "schedule": self.schedule}

    def condition(self, texts: Sequence[str]) -> Condition:
        self.encoded += texts
        return Condition({"length": torch.tensor([float(len(text)) for text in texts], dtype=F64)})

    def velocity(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(latents))
        kind = self.module.weight.dtype
        of_sigma = sigmas_N.to(kind)[:, None] * self.module.bias
        of_text = 0.1 * condition.tensors["length"].to(kind)[:, None] * self.module.of_text
        moved = nn.functional.linear(latents.to(kind).flatten(1), self.module.weight)
        return (moved + of_sigma + of_text).reshape(latents.shape)

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1.0, 0.0, steps + 1, dtype=F64)

    def decoded(self, latents: Tensor) -> Tensor:
        return latents

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def model(shape: tuple[int, ...] = (2, 3), *, seed: int = 0, guidance: float = 1.0, name: str = "a flow") -> FlowModel:
    return FlowModel(Linear(shape, seed=seed), name, guidance=guidance)


def velocity_of(flow: FlowModel, latents: Tensor, sigma: float, text: str) -> Tensor:
    """The velocity of one latent with guidance, written out."""
    own = flow.of
    assert isinstance(own, Linear)

    def plain(length: int) -> Tensor:
        at = own.module.weight @ latents.flatten() + sigma * own.module.bias + 0.1 * length * own.module.of_text
        return at.reshape(latents.shape)

    return plain(0) + flow.guidance * (plain(len(text)) - plain(0))
