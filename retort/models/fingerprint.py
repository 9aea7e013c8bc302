"""Digests of a model: of its weights, configuration, tokenizer, chat template and stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from retort.models.images import ImageProcessing
from retort.models.lm import LanguageModel
from retort.models.stored import StoredModel

#: Keys of a model's configuration that say where or with what it was loaded.
_LOADED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache")


def digests_of(lm: LanguageModel) -> dict[str, str]:
    """Digests of everything in a model's folder that a run depends on, by what it is: weights are hashed whole.

    Of a model whose weights are not here (`StoredModel`), those of the model that it stands for.
    """
    if isinstance(lm, StoredModel):
        return dict(lm.digests)
    seen = lm.image_tokens  # also of a model on a server
    images = {"processor": _hash(seen.settings())} if isinstance(seen, ImageProcessing) else {}
    return images | {
        "weights": lm.whole_digest(),
        "configuration": _hash(json.dumps(_configuration(lm.model.config.to_dict()), sort_keys=True, default=str)),
        "tokenizer": _hash(_tokenizer(lm.tokenizer)),
        "chat template": _hash(json.dumps(lm.tokenizer.chat_template)),
        "stop tokens": _hash(f"{lm.stops.primary} {sorted(lm.stops.ids)}"),
    }


def _configuration(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(name): _configuration(value) for name, value in values.items() if name not in _LOADED}
    return values


def _tokenizer(tokenizer: Any) -> str:
    names = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return names + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rendered = json.loads(backend.to_str())
    # Calls of the tokenizer set these.
    return names + json.dumps({**rendered, "padding": None, "truncation": None}, sort_keys=True)


def fingerprint_of(lm: LanguageModel, digests: Mapping[str, str]) -> str:
    """A fingerprint of all that a model's hidden states depend on: weights, configuration, precision, attention.

    Of one that reads images its processor, too.

    Args:
        lm: The model.
        digests: Its `digests_of`, which take about a second per gigabyte.

    Returns:
        Hex BLAKE2b of 16 bytes.
    """
    if isinstance(lm, StoredModel):
        return lm.fingerprint
    named = [digests["weights"], digests["configuration"], lm.arithmetic]
    named += [digests["processor"]] if "processor" in digests else []
    return hashlib.blake2b(json.dumps(named).encode(), digest_size=16).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
