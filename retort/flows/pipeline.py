"""Pipelines of diffusers as velocity models: Stable Diffusion 3, Flux, and any that calls its transformer alike.

What the transformer is called with is learnt from the pipeline itself (`retort.flows.asked`).
"""

# pyright: basic
from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retort.errors import UserError
from retort.flows.asked import LATENTS, TIME, ask, time_scale
from retort.flows.base import Condition
from retort.flows.folders import INDEX, PipelineFolder, read_folder
from retort.flows.lora import merged_state
from retort.models.files import errors_about
from retort.models.weight_faults import account

#: Files of a part that are copied into a saved folder: no code, nothing pickled.
_COPIED = (".json", ".txt", ".model", ".jinja", ".safetensors")
#: Prompts of different lengths, by which it is seen which arguments have a row per prompt.
_SHORT, _LONG = "", "a picture of a red letter and of a blue letter beside it"


class PipelineFlow:
    """A pipeline of diffusers whose scheduler is FlowMatchEuler; see `retort.flows.base.VelocityModel`.

    Only the transformer is its module. Text encoders and VAE are frozen, in fp32. Prompts go through the pipeline's own
    text encoders, one at a time, so that a prompt's conditioning depends on no other.

    Where guidance was distilled into the transformer (Flux dev), that reads a guidance scale: the default of the
    pipeline's own call (3.5 in Flux), in student and teachers alike. A run's `flow.guidance` comes on top of it, as
    true guidance with the empty prompt, which diffusers calls `true_cfg_scale`.

    Attributes:
        module: The transformer.
        latent_shape: [channels, height, width] before the pipeline packs them for its transformer.
        pipeline: The pipeline.
        size: Height and width of images, pixels.
        library: The library that opens its folder.
    """

    library = "diffusers"

    def __init__(
        self, pipeline: Any, *, height: int | None = None, width: int | None = None, source: Path | None = None
    ) -> None:
        """Takes a pipeline with its parts on their device.

        Args:
            pipeline: The pipeline.
            height: Height of images, pixels; the pipeline's own by default.
            width: Width of images.
            source: The folder that it was read from, whose files `save` copies; None to save the parts anew.

        Raises:
            UserError: The pipeline cannot be used, or makes no images of that size.
        """
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.source = pipeline, source
        self.module: nn.Module = pipeline.transformer
        own = _own_size(pipeline)
        self.size = (height or own[0], width or own[1])
        self._sigmas = dict[int, Tensor]()
        with errors_about(f"images of {self.size[0]} x {self.size[1]}", "the pipeline refuses them"):
            one, two = (ask(pipeline, texts, 2, self.size) for texts in ([_SHORT], [_SHORT, _LONG]))
            self._time_scale = time_scale(pipeline, self.size)
            self._rows, self._constants = _sorted(pipeline, one.arguments, two.arguments)
            self._layout = _Layout(pipeline, one.arguments[LATENTS], self.size)
            self.latent_shape = self._layout.shape
            _check_decoder(pipeline, self.latent_shape, self.size)
            # Some transformers refuse sizes that their pipeline lets pass.
            with torch.no_grad():
                self.velocity(torch.zeros(1, *self.latent_shape), torch.ones(1), self.condition([_SHORT]))

    @staticmethod
    def open(
        label: str, name: str, *, device: torch.device | str, height: int | None = None, width: int | None = None
    ) -> PipelineFlow:
        """Opens a diffusers folder or hub name; all weights become fp32.

        Args:
            label: What messages call it.
            name: Folder or hub name.
            device: Where all of its parts go.
            height: Height of images, pixels; the pipeline's own by default.
            width: Width of images.

        Raises:
            UserError: It cannot be read, see `retort.flows.folders`; or its weights do not fit its settings.
        """
        found = read_folder(label, name)
        with errors_about(label):
            pipeline = _loaded(label, found).to(device)
            try:
                return PipelineFlow(pipeline, height=height, width=width, source=found.path)
            except UserError as error:
                raise UserError(f"{label}: {error}") from None

    @property
    def identity(self) -> Mapping[str, str]:
        """Class and settings of the transformer with the shape of latents, and of the scheduler."""
        latents = " x ".join(map(str, self.latent_shape))
        return {
            "architecture": f"{_described(self.pipeline.transformer)}, latents {latents}",
            "schedule": _described(self.pipeline.scheduler),
        }

    def condition(self, texts: Sequence[str]) -> Condition:
        """What the pipeline's text encoders make of prompts; what is too long for an encoder, it leaves out.

        Raises:
            UserError: The pipeline refuses a prompt.
        """
        rows = list[Condition]()
        for text in texts:
            with errors_about("prompt", f"{text[:60]!r} cannot be encoded"):
                arguments = ask(self.pipeline, [text], 1, self.size).arguments
            rows.append(Condition({name: arguments[name].detach() for name in self._rows}))
        return Condition.joined(rows)

    def velocity(self, latents: Tensor, sigmas_N: Tensor, condition: Condition) -> Tensor:
        """See `VelocityModel`; computed in the dtype of the transformer's weights."""
        weight = next(self.module.parameters())

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(weight.device, weight.dtype if value.is_floating_point() else None)

        given = {name: placed(value) for name, value in [*self._constants.items(), *condition.tensors.items()]}
        given[LATENTS] = self._layout.packed(placed(latents))
        given[TIME] = self._time_scale * placed(sigmas_N)
        found = self.module(**given)[0]
        if found.shape != given[LATENTS].shape:
            raise UserError(
                f"a {type(self.module).__name__} gives {tuple(found.shape)} for latents {tuple(given[LATENTS].shape)}; "
                "a velocity has the shape of the latents"
            )
        return self._layout.unpacked(found)

    def sigmas(self, steps: int) -> Tensor:
        """The scheduler's noise levels as the pipeline sets them, with its shift for images of this size."""
        if steps not in self._sigmas:
            self._sigmas[steps] = ask(self.pipeline, [_SHORT], steps, self.size).sigmas
        return self._sigmas[steps].clone()

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] from 0 to 1, fp32, one at a time through the VAE."""
        vae = self.pipeline.vae
        like = next(vae.parameters())
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        images = [
            vae.decode(one[None].to(like.device, like.dtype) / scale + shift, return_dict=False)[0] for one in latents
        ]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0.0, 1.0)

    def save(self, folder: Path) -> None:
        """Writes a whole diffusers folder, which `DiffusionPipeline.from_pretrained` opens.

        The transformer's weights are written, with an adapter that is in it merged. All other parts are copied from the
        folder that was opened.
        """
        import diffusers  # pyright: ignore[reportMissingImports]

        folder.mkdir(parents=True, exist_ok=True)
        transformer = self.pipeline.transformer
        settings = {name: value for name, value in transformer.config.items() if name != "_name_or_path"}
        with torch.device("meta"):
            whole: Any = type(transformer).from_config(settings)
        whole.load_state_dict(merged_state(self.module), assign=True)
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        for name, part in parts.items():
            if name == "transformer":
                whole.save_pretrained(folder / name, safe_serialization=True)
            elif self.source is not None:
                _copy(self.source / name, folder / name)
            else:
                part.save_pretrained(folder / name)
        index = {"_class_name": type(self.pipeline).__name__, "_diffusers_version": diffusers.__version__}
        index |= {name: value for name, value in self.pipeline.config.items() if not name.startswith("_")}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineFlow:
        """Another one with a copy of the transformer, which shares text encoders and VAE: they are frozen."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module, memo)
        other.pipeline = type(self.pipeline)(**{**self.pipeline.components, "transformer": other.module})
        other.pipeline.set_progress_bar_config(disable=True)
        return other


class _Layout:
    """Latents as the transformer reads them, and as the VAE does."""

    def __init__(self, pipeline: Any, hidden: Tensor, size: tuple[int, int]) -> None:
        self._pipeline, self._size = pipeline, size
        self._packs = hidden.ndim == 3 and hasattr(pipeline, "_pack_latents") and hasattr(pipeline, "_unpack_latents")
        latents = self.unpacked(hidden)
        self.shape = tuple(latents.shape[1:])
        if latents.ndim != 4 or not torch.equal(self.packed(latents), hidden):
            raise UserError(
                f"a {type(pipeline).__name__} gives its transformer latents {tuple(hidden.shape)}, which are no "
                "pictures; that pipeline cannot be used"
            )

    def packed(self, latents: Tensor) -> Tensor:
        if not self._packs:
            return latents
        channels, height, width = latents.shape[1:]
        return self._pipeline._pack_latents(latents, len(latents), channels, height, width)

    def unpacked(self, hidden: Tensor) -> Tensor:
        if not self._packs:
            return hidden
        return self._pipeline._unpack_latents(hidden, *self._size, self._pipeline.vae_scale_factor)


def _loaded(label: str, found: PipelineFolder) -> Any:
    """The pipeline of a folder; each part with weights has all of them from its files."""
    parts = dict[str, Any]()
    for name, kind in found.parts.items():
        if not issubclass(kind, nn.Module):
            continue
        own: Any = kind
        dtype = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
        given: dict[str, Any] = {dtype: torch.float32, "use_safetensors": True, "output_loading_info": True}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            part, info = own.from_pretrained(found.path / name, **given)
        wrong, _ = account(part, info)
        if wrong:
            raise UserError(f"{label}: the weights of {name} are not those of its config.json: {'; '.join(wrong)}")
        # In memory of a file, weights begin wherever its header ends, and some products round by that.
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()
        parts[name] = part.eval().requires_grad_(False)
    absent = dict.fromkeys(found.absent)  # diffusers wants to be told of parts that a folder goes without
    return found.kind.from_pretrained(found.path, **parts, **absent, trust_remote_code=False)


def _own_size(pipeline: Any) -> tuple[int, int]:
    """Height and width of images that a pipeline makes by itself, pixels."""
    known = inspect.signature(type(pipeline).__call__).parameters
    samples = getattr(pipeline, "default_sample_size", None) or pipeline.transformer.config.get("sample_size")
    sides = list[int]()
    for name in ("height", "width"):
        default = known[name].default if name in known else None
        if not isinstance(default, int):
            if not isinstance(samples, int):
                raise UserError(f"a {type(pipeline).__name__} has no size of its own; set flow.height and flow.width")
            default = samples * pipeline.vae_scale_factor
        sides.append(default)
    return sides[0], sides[1]


def _sorted(pipeline: Any, one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments with a row for each prompt, and those that are the same for all prompts."""
    rows, constants = list[str](), dict[str, Any]()
    for name, value in one.items():
        if name in (LATENTS, TIME):
            continue
        other = two.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            constants[name] = value
        elif other.shape == (2 * len(value), *value.shape[1:]) and len(value) == 1:
            rows.append(name)
        elif torch.equal(value, other):
            constants[name] = value.detach()
        else:
            raise UserError(
                f"a {type(pipeline).__name__} gives its transformer {name} {tuple(value.shape)} of one prompt and "
                f"{tuple(other.shape)} of two: what depends on a prompt must have the same shape for all of them"
            )
    if not rows:
        raise UserError(f"a {type(pipeline).__name__} gives its transformer nothing of a prompt; it cannot be used")
    return tuple(rows), constants


def _check_decoder(pipeline: Any, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    config = pipeline.vae.config
    if config.get("scaling_factor") is None or config.get("latents_mean") is not None:
        raise UserError(
            f"its VAE ({type(pipeline.vae).__name__}) has no one factor by which latents are scaled; that "
            "pipeline cannot be used"
        )
    made = tuple(side * pipeline.vae_scale_factor for side in shape[1:])
    if made != size:
        raise UserError(
            f"the pipeline makes images of {made[0]} x {made[1]} pixels instead of {size[0]} x {size[1]}; set "
            "flow.height and flow.width to what it can make"
        )


def _described(part: Any) -> str:
    """Class and settings of a part, in one line."""
    settings = {
        name: list(value) if isinstance(value, tuple) else value  # as it is once it was in a file
        for name, value in part.config.items()
        if not name.startswith("_") and value is not None
    }
    return f"{type(part).__name__} ({', '.join(f'{name} {value}' for name, value in sorted(settings.items()))})"


def _copy(source: Path, target: Path) -> None:
    """Copies a part's files."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.endswith(_COPIED):
            shutil.copyfile(file, target / file.name)
