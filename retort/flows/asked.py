"""What a pipeline of diffusers hands to its transformer, learnt by calling it: no family is known by name.

The pipeline's own `__call__` runs with its transformer's `forward` replaced, which records the arguments. So prompts
are encoded, noise levels shifted and latents packed as the pipeline does it.
"""

# pyright: basic
from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.errors import UserError

#: What every transformer's `forward` calls latents and times.
LATENTS, TIME = "hidden_states", "timestep"


class _Enough(Exception):
    """Ends a pipeline's call."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A pipeline's first call of its transformer.

    Attributes:
        arguments: By name.
        sigmas: The scheduler's noise levels, float64 [steps + 1].
    """

    arguments: Mapping[str, Any]
    sigmas: Tensor


def ask(pipeline: Any, texts: Sequence[str], steps: int, size: tuple[int, int]) -> Asked:
    """Calls a pipeline until it calls its transformer, without guidance.

    Args:
        pipeline: A pipeline of diffusers.
        texts: Prompts.
        steps: Denoising steps.
        size: Height and width of images, pixels.
    """
    seen = list[Mapping[str, Any]]()

    def forward(arguments: Mapping[str, Any]) -> Tensor:
        seen.append(arguments)
        raise _Enough

    with contextlib.suppress(_Enough), _instead(pipeline.transformer, forward):
        _call(pipeline, texts, steps, size)
    if not seen:
        raise UserError(f"a {type(pipeline).__name__} does not call its transformer; that pipeline cannot be used")
    return Asked(seen[0], pipeline.scheduler.sigmas.detach().cpu().double())


def time_scale(pipeline: Any, size: tuple[int, int]) -> float:
    """The factor between a noise level and the time that the transformer reads.

    The pipeline goes through two steps, with an output of the transformer that is known.

    Args:
        pipeline: A pipeline of diffusers.
        size: Height and width of images, pixels.

    Raises:
        UserError: The scheduler gets another thing than the transformer's output, or time is no multiple of the noise
            level: then the output is no velocity from data to noise.
    """
    outputs, arguments, stepped = list[Tensor](), list[Mapping[str, Any]](), list[tuple[Tensor, Tensor]]()
    generator = torch.Generator().manual_seed(0)

    def forward(given: Mapping[str, Any]) -> Tensor:
        arguments.append(given)
        latents = given[LATENTS]
        outputs.append(torch.randn(latents.shape, generator=generator).to(latents))
        return outputs[-1]

    step = pipeline.scheduler.step

    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *more: Any, **named: Any) -> Any:
        stepped.append((model_output, sample))
        return step(model_output, timestep, sample, *more, **named)

    pipeline.scheduler.step = recorded
    try:
        with _instead(pipeline.transformer, forward):
            _call(pipeline, ["a"], 2, size)
    finally:
        del pipeline.scheduler.step
    plain = len(stepped) == len(outputs) == 2 and all(
        torch.equal(out, handed) and torch.equal(given[LATENTS], sample)
        for out, given, (handed, sample) in zip(outputs, arguments, stepped, strict=True)
    )
    sigmas = pipeline.scheduler.sigmas.double().cpu()
    times = torch.stack([given[TIME].double().cpu().flatten()[0] for given in arguments]) if plain else sigmas[:2]
    scale = float(times[0] / sigmas[0])
    if not plain or not torch.allclose(times, scale * sigmas[:2], rtol=1e-3):
        raise UserError(
            f"a {type(pipeline).__name__} uses its transformer's output as another thing than the velocity at a noise "
            "level; that pipeline cannot be used"
        )
    return float(f"{scale:.4g}")


def _call(pipeline: Any, texts: Sequence[str], steps: int, size: tuple[int, int]) -> None:
    """Calls a pipeline for latents; the global random stream stays as it is."""
    known = inspect.signature(type(pipeline).__call__).parameters
    given: dict[str, Any] = {
        "prompt": list(texts),
        "height": size[0],
        "width": size[1],
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(0) for _ in texts],
        "output_type": "latent",
    }
    missing = sorted(given.keys() - known.keys())
    if missing:
        raise UserError(f"a {type(pipeline).__name__} takes no {missing[0]}; it does not make images of prompts alone")
    if not embedded_guidance(pipeline) and "guidance_scale" in known:
        given["guidance_scale"] = 1.0
    pipeline(**given)


def embedded_guidance(pipeline: Any) -> bool:
    """Whether guidance was distilled into the transformer, which reads its scale: then the pipeline's default stays."""
    return bool(pipeline.transformer.config.get("guidance_embeds", False))


@contextlib.contextmanager
def _instead(transformer: Any, forward: Callable[[Mapping[str, Any]], Tensor]) -> Iterator[None]:
    """Within, a transformer's `forward` is another one, which gets the arguments by name."""
    signature = inspect.signature(type(transformer).forward)

    def replaced(*places: Any, **named: Any) -> tuple[Tensor]:
        bound = signature.bind(transformer, *places, **named).arguments
        rest = [name for name, one in signature.parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
        more = {name: value for own in rest for name, value in bound.pop(own, {}).items()}
        return (forward({name: value for name, value in (bound | more).items() if name != "self"}),)

    transformer.forward = replaced
    try:
        yield
    finally:
        del transformer.forward
