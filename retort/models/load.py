"""Loads a model of transformers, ready to score, generate or learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from retort.align.images import ImageTokens
from retort.align.stops import stop_tokens
from retort.errors import UserError
from retort.models import gguf, quantized
from retort.models.described import describe
from retort.models.endpoint import Endpoint
from retort.models.files import Weights, errors_about, read_model, read_tokenizer
from retort.models.image_text import Unreadable, find_processor
from retort.models.image_trials import choose_images
from retort.models.images import ImageProcessing
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel, Precision
from retort.models.randomness import without_randomness
from retort.models.served import ServedModel
from retort.models.server import Server
from retort.models.together import choose_batching
from retort.models.vision import Vision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    name: str,
    *,
    source: str | InMemoryModel | Server | None = None,
    role: str,
    precision: Precision,
    device: torch.device,
    attention: str | None = None,
    stop: Sequence[int | str] | None = None,
    trust_remote_code: bool = False,
    weights: Weights = "refuse",
    bits: quantized.Bits | None = None,
) -> LanguageModel:
    """Loads a model folder or hub name; only safetensors weights are read.

    Args:
        name: The user's name for it, for messages.
        source: Its location, if not `name`; or a model that the caller holds, which is copied, or a server, which
            keeps it.
        role: A student's weights are fp32 and learn; a teacher's are in its precision and do not.
        precision: Precision of products.
        device: Device of the weights.
        attention: Attention implementation of transformers; None for its default.
        stop: Stop tokens instead of the model's own.
        trust_remote_code: Run code that comes with the model.
        weights: The treatment of weights that are missing, left over, of the wrong shape or not finite.
        bits: Round the weights of a frozen model to so many bits; None: not at all.

    Raises:
        UserError: It is not found, is no causal language model, has foreign weights, or has no usable stop token.
    """
    from transformers import GenerationConfig

    label = f"{role} {name}"
    dtype = torch.float32 if role == "student" or precision == "fp32" else torch.bfloat16
    if bits is not None:
        refuse_bits(label, bits, role, source or name)
    if isinstance(source, Server):
        found = describe(name, source, role, stop=stop)
        return ServedModel.of(source, found.tokenizer, found.config, device, found.image_tokens)
    seen = find_processor(label, name, source, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(name, source, role, trust_remote_code=trust_remote_code)
    model, notes = read_model(
        name,
        source,
        role,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        weights=weights,
        quantised=None if bits is None else quantized.arguments(bits, dtype, device),
        images=seen is not None,
    )
    if isinstance(seen, ImageProcessing):
        tokenizer = seen.adopt(tokenizer)
    model.to(device)  # type: ignore[arg-type]
    _wrap_attention(model)
    model.requires_grad_(role == "student")
    without_randomness(model)
    stops = stop_tokens(tokenizer, model.generation_config, model.config, label=label, override=stop)
    original = model.generation_config
    # `generate` takes options that it is not given from the model's own settings (top-k, repetition penalty, ...),
    # which would sample rollouts from another distribution than the one that is scored.
    model.generation_config = GenerationConfig()
    loaded = LanguageModel(model, tokenizer, stops, name, precision, original, notes=notes)
    if not isinstance(source, InMemoryModel):
        loaded.rounded = gguf.rounded(source or name) if bits is None else quantized.words(bits)
    with errors_about(label):  # settings may make a model that cannot compute
        check_head(loaded, finite=weights == "refuse")
    choose_batching(loaded)
    if seen is not None:
        loaded.image_tokens = seen if isinstance(seen, Unreadable) else _with_images(loaded, seen)
    return loaded


def _with_images(lm: LanguageModel, processing: ImageProcessing) -> ImageTokens:
    """Gives a model its images, once it is tried that it reads them; text needs none, so it stays without otherwise."""
    try:
        with errors_about(lm.name, "its images cannot be read"):
            lm.vision = Vision(lm.model, processing)
            choose_images(lm)
    except UserError as error:
        lm.vision = None
        return Unreadable(str(error))
    return processing


def refuse_bits(label: str, bits: quantized.Bits, role: str, source: str | InMemoryModel | Server | Endpoint) -> None:
    """Raises `UserError` if a model's weights cannot be rounded to so many bits."""
    if role == "student":
        raise UserError(f"{label}: bits = {bits} is for frozen models, and the student learns in fp32; leave it out")
    if isinstance(source, Server | Endpoint):
        raise UserError(
            f"{label}: bits = {bits} is for weights that are loaded here, and a server holds these; leave it out"
        )
    if isinstance(source, InMemoryModel):
        raise UserError(
            f"{label}: bits = {bits} is for models in a folder, and this one is given as it is; give a path"
        )
    if gguf.is_gguf(source):
        raise UserError(f"{label}: bits = {bits} is for whole weights, and a GGUF file has its own; leave it out")
    quantized.need(bits, label)


def check_head(lm: LanguageModel, *, finite: bool = True) -> None:
    """Raises `UserError` if head and hidden states do not give the model's own logits, or those are not finite."""
    ids_RL = torch.arange(1, 5, device=lm.device)[None] % lm.head().width
    ask = (
        f"{lm.name}: {type(lm.model).__name__} changes its logits in a way Retort does not know; "
        "please open an issue that names this family"
    )
    with torch.no_grad():
        own = lm.model(input_ids=ids_RL, use_cache=False).logits.float()
        # Some families keep their layers under another name than the one that transformers looks for.
        last = getattr(lm.model.base_model(input_ids=ids_RL, use_cache=False), "last_hidden_state", None)
        if last is None:
            raise UserError(ask.replace("changes its logits", "gives its hidden states"))
        ours = lm.head().logits(last).float()
    if finite and not bool(own.isfinite().all()):
        raise UserError(
            f"{lm.name}: its logits are NaN or infinite; a number in its config.json, or a weight, is far off"
        )
    close = {"rtol": 1e-2, "atol": 1e-2 * float(own.nan_to_num().std()) + 1e-6, "equal_nan": True}
    if own.shape != ours.shape or not torch.allclose(own, ours, **close):
        raise UserError(ask)


def use_attention(lm: LanguageModel, name: str) -> bool:
    """Sets an attention implementation of transformers; False, and nothing changed, where the model has no such one."""
    before = lm.model.config._attn_implementation
    try:
        lm.model.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    # A model that sets it at loading only logs a failure, and keeps the implementation that it had.
    if lm.model.config._attn_implementation != name:
        lm.model.config._attn_implementation = before
        return False
    _wrap_attention(lm.model)
    choose_batching(lm)
    if lm.vision is not None:
        choose_images(lm)
    return True


def _wrap_attention(model: PreTrainedModel) -> None:
    """Makes a family that leaves attention to transformers accept packed rows."""
    from retort.models.packing import wrapped

    chosen = model.config._attn_implementation
    if chosen is not None and wrapped(chosen) != chosen and type(model)._can_set_attn_implementation():
        model.set_attn_implementation(wrapped(chosen))
