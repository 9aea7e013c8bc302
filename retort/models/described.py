"""A model's tokenizer and configuration, read from its small files without its weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from retort.align.images import ImageTokens
from retort.align.stops import StopTokens, stop_tokens
from retort.models import gguf
from retort.models.endpoint import Endpoint
from retort.models.files import errors_about, locate, read_tokenizer
from retort.models.image_text import find_processor
from retort.models.images import ImageProcessing
from retort.models.in_memory import InMemoryModel
from retort.models.server import Server

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Described:
    """The data of a model that are known before its weights are read.

    Attributes:
        name: The user's name for it, for messages.
        tokenizer: Its tokenizer.
        config: Its configuration of transformers.
        stops: Its stop tokens; None where only loading shows which of its parts' count.
        image_tokens: How images are written into its prompts; None for a model of text alone.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: Any
    stops: StopTokens | None = None
    image_tokens: ImageTokens | None = None

    @property
    def context(self) -> int:
        """The longest sequence it takes, tokens."""
        return context_of(self.config)

    @property
    def reach(self) -> int | None:
        """Tokens that its rotary positions are stretched to, where that is more than its context; else None."""
        text = self.config.get_text_config()
        given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        each = given.values() if any(isinstance(one, Mapping) for one in given.values()) else [given]
        for rope in (one for one in each if isinstance(one, Mapping)):
            factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or self.context
            if isinstance(factor, int | float) and factor > 1 and original * factor > self.context:
                return int(original * factor)
        return None


def describe(
    name: str,
    source: str | InMemoryModel | Server | Endpoint | None,
    role: str,
    *,
    stop: Sequence[int | str] | None = None,
    trust_remote_code: bool = False,
) -> Described:
    """Reads all of a model's folder except its weights.

    Args:
        name: The user's name for it, for messages.
        source: Its location, if not `name`; or a model that the caller or a server holds.
        role: Role of the model, for messages.
        stop: Stop tokens instead of the model's own.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: It does not exist, cannot be read, or has no usable stop token.
    """
    from transformers import AutoConfig, GenerationConfig

    if isinstance(source, Endpoint):
        read = describe(name, source.reads, role, stop=stop, trust_remote_code=trust_remote_code)
        # Such a server is sent ids alone, whatever images the model behind the tokenizer reads.
        return replace(read, config=_within(read.config, source.offers.context), image_tokens=None)
    label = f"{role} {name}"
    seen = find_processor(label, name, source, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(name, source, role, trust_remote_code=trust_remote_code)
    if isinstance(seen, ImageProcessing):
        tokenizer = seen.adopt(tokenizer)
    generation: Any = None
    if isinstance(source, InMemoryModel):
        config, generation = source.model.config, source.model.generation_config
    else:
        location = locate(label, name, source)
        with errors_about(label):
            if gguf.is_gguf(location):
                config = gguf.read_config(location)
            else:
                config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
                with contextlib.suppress(OSError):  # many models have none
                    generation = GenerationConfig.from_pretrained(location)
    stops = None
    if config.get_text_config() is config:  # for a model made of parts, only loading shows which part's stops count
        stops = stop_tokens(tokenizer, generation, config, label=label, override=stop)
    return Described(name, tokenizer, config, stops, seen)


def _within(config: Any, context: int | None) -> Any:
    """A configuration with a server's context; where that is not known, as it is."""
    found = copy.deepcopy(config)
    if context is not None:
        found.get_text_config().max_position_embeddings = context
    return found


def context_of(config: Any) -> int:
    """The longest sequence that a model of a configuration takes, tokens."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)
