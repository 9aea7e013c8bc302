"""A velocity model in a run: guidance, precision, what of it learns, and prompts that are read once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.errors import UserError
from retort.flows.base import Condition, VelocityModel
from retort.models.adapter import Adapter
from retort.models.sharding import Sharding

#: Prompts whose conditioning is kept, at most; the oldest is dropped first.
KEPT = 4096


class FlowModel:
    """A velocity model and what a run knows of it.

    Attributes:
        of: The velocity model.
        name: Its name for messages.
        guidance: Scale w of classifier-free guidance, with which the velocity is
            `v(empty) + w (v(prompt) - v(empty))`; 1 for none.
        precision: `fp32`, or `bf16` for products in bf16; weights are fp32 either way.
        frozen: Whether nothing of it learns.
        adapter: The LoRA adapter that learns in the place of its weights, if there is one.
        sharding: Its weights are whole: a flow model learns in one process.
    """

    def __init__(
        self, of: VelocityModel, name: str, *, guidance: float = 1.0, precision: str = "fp32", frozen: bool = False
    ) -> None:
        """Takes a velocity model on its device; a frozen one gets no gradient from now on."""
        self.of, self.name, self.guidance, self.precision, self.frozen = of, name, guidance, precision, frozen
        self.adapter: Adapter | None = None
        self.sharding = Sharding()
        self._conditions: dict[str, Condition] = {}
        if frozen:
            of.module.requires_grad_(False)
        of.module.eval()

    @property
    def device(self) -> torch.device:
        """Where it is; the CPU, where it has no weights, as a velocity in closed form has none."""
        first = next(self.of.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the latents that it makes: float64 where its weights are, else fp32."""
        first = next(self.of.module.parameters(), None)
        return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32

    @property
    def parameters(self) -> int:
        """Number of its weights."""
        return sum(own.numel() for own in self.of.module.parameters())

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that learn, by name."""
        return {name: own for name, own in self.of.module.named_parameters() if own.requires_grad}

    def save(self, folder: Path) -> None:
        """Writes it into an empty folder, an adapter merged; see `VelocityModel.save`."""
        self.of.save(folder)

    @property
    def library(self) -> str:
        """The library that opens its folder, as a model card names it."""
        return getattr(self.of, "library", "retort")

    def digest(self) -> str:
        """Digest of all its weights."""
        found = hashlib.blake2b(digest_size=16)
        for name, own in sorted(self.of.module.state_dict().items()):
            found.update(name.encode())
            found.update(own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @contextlib.contextmanager
    def compute(self) -> Generator[None]:
        """Within it products are in the model's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def velocity(self, latents: Tensor, sigmas_N: Tensor, texts: Sequence[str]) -> Tensor:
        """The velocity with guidance, [N, ...], in the dtype of the latents.

        Args:
            latents: [N, ...]; they are moved to the model.
            sigmas_N: Their noise levels, [N].
            texts: The prompt of each.

        Raises:
            UserError: The model breaks the contract of `VelocityModel`.
        """
        latents, sigmas_N = latents.to(self.device), sigmas_N.to(self.device, latents.dtype)
        condition = self._condition(texts)
        with self.compute():
            if self.guidance == 1.0:
                return self._asked(latents, sigmas_N, condition)
            both = Condition.joined([self._condition([""] * len(texts)), condition])
            twice = self._asked(torch.cat([latents, latents]), torch.cat([sigmas_N, sigmas_N]), both)
        bare, guided = twice.chunk(2)
        return bare + self.guidance * (guided - bare)

    def sigmas(self, steps: int) -> Tensor:
        """The noise levels of so many steps, see `VelocityModel.sigmas`.

        Raises:
            UserError: They are none, or do not fall from at most 1 to 0.
        """
        found: Any = self.of.sigmas(steps)  # a caller's own, whatever its types say
        if not isinstance(found, Tensor) or found.shape != (steps + 1,) or not found.is_floating_point():
            raise UserError(
                f"{self.name}: its sigmas({steps}) must be a tensor of {steps + 1} floats, not {_shown(found)}"
            )
        found = found.detach().double().cpu()
        if not (found[0] <= 1 and found[-1] == 0 and bool((found.diff() < 0).all())):
            raise UserError(
                f"{self.name}: its sigmas({steps}) must fall from at most 1 (noise) to 0 (data); they go from "
                f"{float(found[0]):g} to {float(found[-1]):g}"
            )
        return found

    def _asked(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Tensor:
        """The model's own velocity, in the dtype of the latents."""
        found: Any = self.of.velocity(latents, sigmas_N, condition)
        if not isinstance(found, Tensor) or found.shape != latents.shape or not found.is_floating_point():
            raise UserError(
                f"{self.name}: its velocity must be a tensor of floats {tuple(latents.shape)}, as the latents are, not "
                f"{_shown(found)}"
            )
        return found.to(latents)

    def _condition(self, texts: Sequence[str]) -> Condition:
        """One row for each text; each is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._conditions]
        if new:
            with torch.no_grad():
                encoded = self._read(new)
            for place, text in enumerate(new):
                self._conditions[text] = encoded.rows(torch.tensor([place])).to("cpu")
        rows = list(dict.fromkeys(texts))
        known = Condition.joined([self._conditions[text] for text in rows])
        while len(self._conditions) > KEPT:
            del self._conditions[next(iter(self._conditions))]
        places: Mapping[str, int] = {text: place for place, text in enumerate(rows)}
        return known.rows(torch.tensor([places[text] for text in texts])).to(self.device)

    def _read(self, texts: Sequence[str]) -> Condition:
        """The model's own condition of some prompts."""
        found: Any = self.of.condition(texts)
        tensors = list(found.tensors.values()) if isinstance(found, Condition) else []
        if not isinstance(found, Condition) or not tensors or any(own.shape[:1] != (len(texts),) for own in tensors):
            raise UserError(
                f"{self.name}: its condition of {len(texts)} prompts must be a `retort.flows.Condition` whose tensors "
                f"have a row for each, not {', '.join(map(_shown, tensors)) or _shown(found)}"
            )
        return found


def _shown(found: object) -> str:
    """What a model returned, in words."""
    return f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
