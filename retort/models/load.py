"""A model of transformers made ready for whoever scores, writes or learns with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from retort.align.stops import stop_tokens
from retort.models.files import Weights, blamed_on, read_model, read_tokenizer
from retort.models.held import Held
from retort.models.lm import LanguageModel, Precision
from retort.models.randomness import without_randomness
from retort.models.together import settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    name: str,
    *,
    source: str | Held | None = None,
    role: str,
    precision: Precision,
    device: torch.device,
    attention: str | None = None,
    stop: Sequence[int | str] | None = None,
    trust_remote_code: bool = False,
    weights: Weights = "refuse",
) -> LanguageModel:
    """Loads a model folder or hub name; only safetensors weights are read.

    Args:
        name: What the user calls it, for messages.
        source: Where it lies, if not at `name`; or a model that the caller holds, of which a copy is made.
        role: A student's weights are fp32 and learn; a teacher's are in its precision and do not.
        precision: Of products.
        device: Where to.
        attention: Attention implementation of transformers; None for its default.
        stop: Stop tokens instead of the model's own.
        trust_remote_code: Run code that comes with the model.
        weights: What to do about weights that are missing, left over, misshapen or no numbers.

    Raises:
        UserError: Not found, not a causal language model, weights that are not its own, no usable stop token.
    """
    from transformers import GenerationConfig

    who = f"{role} {name}"
    dtype = torch.float32 if role == "student" or precision == "fp32" else torch.bfloat16
    tokenizer = read_tokenizer(name, source, role, trust_remote_code=trust_remote_code)
    model, notes = read_model(
        name,
        source,
        role,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        weights=weights,
    )
    model.to(device)  # type: ignore[arg-type]
    _wrap_attention(model)
    model.requires_grad_(role == "student")
    without_randomness(model)
    stops = stop_tokens(tokenizer, model.generation_config, model.config, who=who, override=stop)
    written = model.generation_config
    # `generate` fills what it is not told from the model's own settings (top-k, repetition penalty, ...), which would
    # make rollouts come from another distribution than the one that is scored.
    model.generation_config = GenerationConfig()
    loaded = LanguageModel(model, tokenizer, stops, name, precision, written, notes=notes)
    with blamed_on(who):  # settings that make a model, but none that computes
        loaded.check_head(finite=weights == "refuse")
    settle(loaded)
    return loaded


def use_attention(lm: LanguageModel, name: str) -> bool:
    """Sets an attention implementation of transformers; False, and nothing changed, where the model has no such one."""
    before = lm.model.config._attn_implementation
    try:
        lm.model.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    # A model that sets it at loading only says so in a log line, and keeps what it had.
    if lm.model.config._attn_implementation != name:
        lm.model.config._attn_implementation = before
        return False
    _wrap_attention(lm.model)
    settle(lm)
    return True


def _wrap_attention(model: PreTrainedModel) -> None:
    """Lets a family that leaves attention to transformers take packs."""
    from retort.models.packing import wrapped

    chosen = model.config._attn_implementation
    if chosen is not None and wrapped(chosen) != chosen and type(model)._can_set_attn_implementation():
        model.set_attn_implementation(wrapped(chosen))
