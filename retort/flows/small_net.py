"""The network of small velocity models: a transformer over the patches of a latent, modulated by time and prompt.

It follows the diffusion transformer (DiT, Peebles and Xie 2023, adaLN-zero): every block's normalised input is shifted
and scaled, and its output gated, by a function of the noise level and the prompt. A latent that is no picture is one
patch. Linear layers have the names that they have in diffusers (`to_q`, `to_k`, `to_v`, `to_out`), so that adapters
find them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

# Axes: N latents, P patches, D width, H heads, V words.


class SmallConfig(BaseModel):
    """What a small velocity model is, as its `config.json` holds it.

    Attributes:
        retort_flow: Version of the format.
        latent_shape: Shape of one latent: [channels, height, width] of a picture, or [values].
        words: All words that a prompt may have.
        patch: Side of a patch of a picture, pixels.
        width: Width D of the hidden states.
        layers: Number of blocks.
        heads: Attention heads.
        mlp: Width of the MLPs, in D.
        shift: Shift of the schedule: above 1, more of the steps are at high noise, as in FlowMatchEuler.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    retort_flow: int = Field(default=1, ge=1, le=1)
    latent_shape: tuple[int, ...] = Field(min_length=1, max_length=3, strict=False)
    words: tuple[str, ...] = Field(min_length=1, max_length=4096, strict=False)
    patch: int = Field(default=4, ge=1, le=64)
    width: int = Field(default=96, ge=2, le=2048)
    layers: int = Field(default=4, ge=1, le=48)
    heads: int = Field(default=4, ge=1, le=64)
    mlp: int = Field(default=2, ge=1, le=8)
    shift: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> SmallConfig:
        shape = self.latent_shape
        if len(shape) == 2 or not all(1 <= size <= 1024 for size in shape):
            raise ValueError("latent_shape must be [channels, height, width] or [values], each from 1 to 1024")
        if len(shape) == 3 and (shape[1] % self.patch or shape[2] % self.patch):
            raise ValueError("patch must divide height and width")
        if self.width % self.heads or self.width % 2:
            raise ValueError("width must be even, and a multiple of heads")
        if len(set(self.words)) < len(self.words):
            raise ValueError("a word is there twice")
        return self

    @property
    def patches(self) -> int:
        """P, the number of patches."""
        return 1 if len(self.latent_shape) == 1 else math.prod(self.latent_shape[1:]) // self.patch**2

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return math.prod(self.latent_shape) // self.patches


class SmallNet(nn.Module):
    """Predicts a velocity from a latent, its noise level and the words of a prompt.

    Attributes:
        config: What it is.
    """

    def __init__(self, config: SmallConfig) -> None:
        """Makes one with new weights; before training it predicts zeros."""
        super().__init__()
        self.config = config
        width = config.width
        self.patch_in = nn.Linear(config.patch_values, width)
        self.position = nn.Parameter(0.5 * torch.randn(config.patches, width))
        self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.words_in, self.words_out = nn.Linear(len(config.words), width), nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.patch_values)
        nn.init.normal_(self.words_in.weight)  # a prompt has few words: each must count
        for layer in (self.modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor, sigmas_N: Tensor, words_NV: Tensor) -> Tensor:
        """Predicts noise minus data.

        Args:
            latents: [N, ...].
            sigmas_N: Noise levels, from 0 (data) to 1 (noise).
            words_NV: How often each word is in the prompt; zeros: no prompt.

        Returns:
            [N, ...].
        """
        x_NPD = self.patch_in(self._cut(latents)) + self.position
        time_ND = self.time_out(F.silu(self.time_in(_waves(sigmas_N, self.config.width))))
        asked_ND = self.words_out(F.silu(self.words_in(words_NV)))
        about_ND = F.silu(time_ND + asked_ND)
        for block in self.blocks:
            x_NPD = block(x_NPD, about_ND)
        shift, scale = self.modulation(about_ND)[:, None].chunk(2, -1)
        return self._joined(self.patch_out(_normal(x_NPD) * (1 + scale) + shift))

    def _cut(self, latents: Tensor) -> Tensor:
        """The patches of latents, [N, P, values]."""
        if latents.ndim == 2:
            return latents[:, None]
        return F.pixel_unshuffle(latents, self.config.patch).flatten(2).transpose(1, 2)

    def _joined(self, values_NPX: Tensor) -> Tensor:
        """Latents out of patches, the reverse of `_cut`."""
        shape = self.config.latent_shape
        if len(shape) == 1:
            return values_NPX[:, 0]
        rows, columns = (size // self.config.patch for size in shape[1:])
        values_NXHW = values_NPX.transpose(1, 2).reshape(len(values_NPX), -1, rows, columns)
        return F.pixel_shuffle(values_NXHW, self.config.patch)


class Block(nn.Module):
    """Attention and an MLP, both modulated; where there is one patch only, no attention."""

    def __init__(self, config: SmallConfig) -> None:
        """Makes one that at first changes nothing."""
        super().__init__()
        self.attn = Attention(config.width, config.heads) if config.patches > 1 else None
        self.mlp = MLP(config.width, config.mlp)
        self.modulation = nn.Linear(config.width, (3 if self.attn is None else 6) * config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_NPD: Tensor, about_ND: Tensor) -> Tensor:
        """The hidden states after it.

        Args:
            x_NPD: Hidden states.
            about_ND: What time and prompt are.
        """
        modulation_N1X = self.modulation(about_ND)[:, None]
        shift, scale, gate = modulation_N1X[..., -3 * x_NPD.shape[-1] :].chunk(3, -1)
        if self.attn is not None:
            first_shift, first_scale, first_gate = modulation_N1X[..., : 3 * x_NPD.shape[-1]].chunk(3, -1)
            x_NPD = x_NPD + first_gate * self.attn(_normal(x_NPD) * (1 + first_scale) + first_shift)
        return x_NPD + gate * self.mlp(_normal(x_NPD) * (1 + scale) + shift)


class Attention(nn.Module):
    """Attention of all patches to all patches."""

    def __init__(self, width: int, heads: int) -> None:
        """Makes one."""
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """What each patch takes from the others, [N, P, D]."""
        q, k, v = (to(x_NPD).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int, factor: int) -> None:
        """Makes one."""
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """[N, P, D]."""
        return self.fc2(F.gelu(self.fc1(x_NPD), approximate="tanh"))


def _normal(x_NPD: Tensor) -> Tensor:
    """Mean 0 and variance 1 over D, without weights: the modulation is theirs."""
    return F.layer_norm(x_NPD, x_NPD.shape[-1:], eps=1e-6)


def _waves(sigmas_N: Tensor, width: int) -> Tensor:
    """Noise levels as sines and cosines of falling frequencies, [N, width]."""
    steps = torch.arange(width // 2, device=sigmas_N.device, dtype=sigmas_N.dtype)
    angles = 1000.0 * sigmas_N[:, None] * torch.exp(-math.log(10_000.0) * 2.0 / width * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)
