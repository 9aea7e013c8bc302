"""Small velocity models, of a megabyte: those of the built-in tasks, and any made by the same class.

A folder holds `config.json`, whose key `retort_flow` is the version of the format, and `model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from retort.errors import UserError, did_you_mean, quoted, shortened, visible
from retort.flows.base import Condition
from retort.flows.lora import merged_state
from retort.flows.small_net import SmallConfig, SmallNet

#: The key of `config.json` by which a folder is one of these.
KEY = "retort_flow"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: Longest `config.json` that is read, bytes.
_LONGEST = 1_000_000


class SmallFlow:
    """A small conditional flow, see `retort.flows.base.VelocityModel`.

    A prompt is the words in it, split at spaces, in any order; a prompt without words is the unconditional one. A
    latent with three axes is a picture, whose pixels from 0 to 1 are -1 to 1 in the latent; one with a single axis is a
    point.

    Attributes:
        module: The network.
        config: What it is.

    Example:
        >>> import torch
        >>> from retort.flows.small import SmallConfig, SmallFlow
        >>> flow = SmallFlow.new(SmallConfig(latent_shape=(2,), words=("ring", "moon"), width=16), seed=0)
        >>> asked = flow.condition(["ring", ""])
        >>> flow.velocity(torch.randn(2, 2), torch.tensor([1.0, 0.5]), asked)  # nothing is learnt yet
        tensor([[0., 0.],
                [0., 0.]], grad_fn=<SelectBackward0>)
        >>> flow.sigmas(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(self, net: SmallNet) -> None:
        """Wraps a network."""
        self.module: torch.nn.Module = net
        self.config = net.config
        self.latent_shape = self.config.latent_shape
        self._place = {word: place for place, word in enumerate(self.config.words)}

    @staticmethod
    def new(config: SmallConfig, seed: int) -> SmallFlow:
        """One with new weights, fp32; the global random stream stays as it is.

        Args:
            config: What it is.
            seed: Seed of the weights.
        """
        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
            return SmallFlow(SmallNet(config))

    @staticmethod
    def open(folder: Path | str) -> SmallFlow:
        """Opens a folder; weights become fp32, or stay float64.

        Names, shapes and dtypes are compared with the settings before a weight is read.

        Args:
            folder: As `save` made it.

        Raises:
            UserError: It holds no such model, or its files are damaged or do not belong together.
        """
        folder = Path(folder)
        config = _config(folder / CONFIG)
        with torch.device("meta"):
            net = SmallNet(config)
        found = _weights(folder / WEIGHTS, {name: tuple(own.shape) for name, own in net.state_dict().items()})
        net.load_state_dict(found, assign=True)
        return SmallFlow(net.requires_grad_(True))

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Saves it, with an adapter that is in it merged.

        Args:
            folder: An empty folder, or one that does not exist.
            dtype: Of the weights in the file; their own by default.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: own.detach().to("cpu", dtype or own.dtype).contiguous()
            for name, own in merged_state(self.module).items()
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self.config.model_dump(mode="json"), ensure_ascii=False, indent=1)
        (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")

    @property
    def identity(self) -> Mapping[str, str]:
        """Latents, and what makes the noise levels; width and words may differ."""
        return {
            "architecture": f"small flow, latents {' x '.join(map(str, self.latent_shape))}",
            "schedule": f"linear, shift {self.config.shift:g}",
        }

    def condition(self, texts: Sequence[str]) -> Condition:
        """How often each word is in each text.

        Raises:
            UserError: A word that the model does not know.
        """
        words_NV = torch.zeros(len(texts), len(self.config.words))
        for row, text in enumerate(texts):
            for place in self._places(text):
                words_NV[row, place] += 1.0
        return Condition({"words": words_NV.to(next(self.module.parameters()).device)})

    def check_texts(self, texts: Sequence[str]) -> None:
        """See `retort.flows.base.ChecksTexts`."""
        for text in texts:
            self._places(text)

    def _places(self, text: str) -> list[int]:
        """The words of a text, by their place in the settings."""
        for word in text.split():
            if word not in self._place:
                raise UserError(
                    f"prompt {quoted(text)}: this model does not know the word '{visible(shortened(word, 40))}'; "
                    f"{did_you_mean(word, self.config.words)}"
                )
        return [self._place[word] for word in text.split()]

    def velocity(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Tensor:
        """See `VelocityModel`; computed in the dtype of the weights."""
        kind = next(self.module.parameters()).dtype
        return self.module(latents.to(kind), sigmas_N.to(kind), condition.tensors["words"].to(kind))

    def sigmas(self, steps: int) -> Tensor:
        """Evenly spaced from 1 to 0, then shifted: s t / (1 + (s - 1) t)."""
        even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        return self.config.shift * even / (1.0 + (self.config.shift - 1.0) * even)

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures from 0 to 1; points as they are."""
        return (latents / 2 + 0.5).clamp(0.0, 1.0) if len(self.latent_shape) == 3 else latents


def _config(file: Path) -> SmallConfig:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            raise UserError(f"{file}: longer than {_LONGEST} bytes; a flow's settings are short")
        given: object = json.loads(raw)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a flow's folder has one") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: no JSON; copy the folder again") from error
    if not isinstance(given, dict) or KEY not in given:
        raise UserError(f"{file}: no small flow of Retort's (no '{KEY}' in it)")
    try:
        return SmallConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise UserError(f"{file}: {visible(shortened(where, 60))}: {first['msg']}") from error


def _weights(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file in fp32, after their names and shapes were compared."""
    if not file.is_file():
        raise UserError(f"{file}: missing; a flow's weights are in it")
    try:
        opening: Any = safe_open(file, framework="pt")  # safetensors names no types
        with opening as opened:
            names = set[str](opened.keys())
            for name in sorted(names ^ shapes.keys()):
                surplus = "in it, but not in the model of config.json" if name in names else "missing"
                raise UserError(f"{file}: tensor '{visible(shortened(name, 60))}' is {surplus}")
            for name, shape in shapes.items():
                there = tuple[int, ...](opened.get_slice(name).get_shape())
                if there != shape:
                    raise UserError(f"{file}: tensor '{name}' is {there}, and {shape} by config.json")
            found: dict[str, Tensor] = {name: opened.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"{file}: no safetensors file, or a damaged one ({visible(shortened(words, 100))})") from error
    for name, own in found.items():
        if not own.is_floating_point() or not bool(own.isfinite().all()):
            raise UserError(f"{file}: tensor '{name}' holds what is no finite number ({own.dtype})")
    return {name: own if own.dtype == torch.float64 else own.float() for name, own in found.items()}
