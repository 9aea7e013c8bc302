"""A LoRA adapter in a model, by `peft`: what learns, what is saved, and the model without the adapter.

`peft` puts its layers into the model that transformers made; the model's interface stays the same to packing,
generation and the loss core. Only the head is read separately (`Adapter.on`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from retort.core.head import LowRank
from retort.errors import UserError

#: The name that peft gives to the adapter that it adds to a model.
NAME = "default"
_BASE = ".base_layer"


class Adapter:
    """An adapter in a model. Its tensors are the model's only parameters that learn."""

    def __init__(self, model: Any, wrapper: Any, settings: Mapping[str, Any]) -> None:
        """Wraps the layers that `peft` has put into a model.

        Args:
            model: A model with the adapter's layers inside.
            wrapper: `peft`'s own object around it, which saves the adapter's folder; None where it is never saved.
            settings: Rank, alpha, targets, rslora: two adapters with different settings are not the same.
        """
        from peft.tuners.lora import LoraLayer

        self.model, self.wrapper, self.settings = model, wrapper, dict(settings)
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        self.tensors: dict[str, Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if any(part.startswith("lora_") for part in name.split("."))
        }
        self._on = True

    def own_name(self, name: str) -> str | None:
        """The name of a tensor in the model's folder; None for one of the adapter's."""
        return None if name in self.tensors else _without_wrappers(name)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Restores, for the block, the model before it had an adapter, bit by bit."""
        before = self._on
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        if on != self._on:
            for layer in self.layers.values():
                layer.enable_adapters(on)
            for parameter in self.tensors.values():
                parameter.requires_grad_()  # the same parameters learn on both sides; peft changes that on one
            self._on = on

    def on(self, layer: Module) -> tuple[Any, LowRank | None]:
        """A layer without the adapter, and the adapter's low-rank update of it."""
        if not any(layer is own for own in self.layers.values()):
            return layer, None
        adapted: Any = layer
        if not self._on:
            return adapted.base_layer, None
        down, up = adapted.lora_A[NAME].weight, adapted.lora_B[NAME].weight
        return adapted.base_layer, LowRank(down, up, float(adapted.scaling[NAME]))

    @torch.no_grad()
    def merged(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of an ordinary model with the same outputs, by the names of the model's folder.

        The model itself is not changed: adding an adapter and subtracting it again would leave rounding in its weights.

        Args:
            state: The model's state, where it is spread over ranks; its layers hold whole weights for the moment.
        """
        whole: Mapping[str, Tensor] = self.model.state_dict() if state is None else state
        found = {own: x for name, x in whole.items() if (own := self.own_name(name)) is not None}
        for name, layer in self.layers.items():
            own, weight = _adapted(name, layer)
            found[own] = weight + layer.get_delta_weight(NAME).to(weight.dtype)
        return found

    @torch.no_grad()
    def check_merging(self) -> None:
        """Checks that `merged` could give the weights of the model; keeps no copy of them.

        Raises:
            UserError: A layer's weight is missing, or not of the shape that its adapter needs.
        """
        shapes = {
            own: x.shape for name, x in self.model.state_dict().items() if (own := self.own_name(name)) is not None
        }
        for name, layer in self.layers.items():
            own, weight = _adapted(name, layer)
            delta = layer.get_delta_weight(NAME)
            if shapes.get(own) != weight.shape or delta.shape != weight.shape:
                raise UserError(
                    f"lora.targets: the adapter of {_without_wrappers(name)} could not be merged into the model at the "
                    "end; leave that layer out"
                )

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Saves it in the format that `PeftModel.from_pretrained` opens; `state` as in `merged`."""
        given = {} if state is None else {"state_dict": {f"base_model.model.{name}": x for name, x in state.items()}}
        # peft would also save whole embeddings if the head is a target, though nothing in them has changed.
        self.wrapper.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, **given)


def need_peft() -> None:
    """Raises `UserError` if `peft` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora.rank needs peft: pip install 'retort-distill[lora]'")


def _without_wrappers(name: str) -> str:
    """The name of a tensor or layer in the original model; a layer that is adapted twice has two wrappers."""
    return re.sub(rf"{re.escape(_BASE)}(?=\.|$)", "", name)


def _adapted(name: str, layer: Any) -> tuple[str, Tensor]:
    """The tensor that a layer's adapter is for, with its name in the model's folder."""
    # peft adapts the experts of a mixture, which are one tensor, by that tensor's name.
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None:
        return f"{_without_wrappers(name)}.{parameter}", layer.get_param()
    weight = getattr(layer.base_layer, "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(layer, "get_delta_weight"):
        raise UserError(
            f"lora.targets: {_without_wrappers(name)} is a {type(layer.base_layer).__name__}, into which an adapter "
            "cannot be merged at the end; leave it out"
        )
    return f"{_without_wrappers(name)}.weight", weight


def described(settings: Mapping[str, Any] | None) -> str:
    """Settings of an adapter in words; None for none."""
    if settings is None:
        return "without an adapter"
    scale = f"alpha {settings['alpha']:g}{', rslora' if settings['rslora'] else ''}"
    return f"with a LoRA adapter of rank {settings['rank']}, {scale}, on {', '.join(settings['targets'])}"
