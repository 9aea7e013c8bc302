"""A model whose hidden states are stored: its tokenizer, its settings and its head, without the layers before it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from retort.align.stops import StopTokens
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.files import flush, parse_object, write_text
from retort.models.files import errors_about, read_tokenizer
from retort.models.image_text import find_processor
from retort.models.images import ImageProcessing
from retort.models.lm import LanguageModel, Precision

if TYPE_CHECKING:
    from torch.nn import Parameter

#: File of what is neither the tokenizer's nor the model's configuration, and of the head's tensors.
RECORD, HEAD = "record.json", "head.safetensors"


@dataclass(eq=False)
class StoredModel(LanguageModel):
    """A model that can render, stop, and turn hidden states into logits, but cannot compute hidden states.

    Its layers are on PyTorch's meta device, and take no memory.

    Attributes:
        digests: The `digests_of` of the model that it stands for.
        fingerprint: The `fingerprint_of` that model.
        sample: The `digest` of that model.
        elsewhere: Whether a server had that model, in a precision that is the server's own.
    """

    here: ClassVar[bool] = False
    digests: Mapping[str, str] = field(default_factory=lambda: {})
    fingerprint: str = ""
    sample: str = ""
    elsewhere: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.kept_head().weight_VD.device

    def digest(self) -> str:
        """See `LanguageModel`."""
        return self.sample

    @property
    def parameters(self) -> int:
        """Of the model that it stands for."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def trainable(self) -> dict[str, Parameter]:
        """Nothing."""
        return {}

    def weights(self) -> dict[str, Parameter]:
        """None of them is here."""
        return {}

    def all_hidden(self, sequences: Sequence[TokenSequence], budget: int) -> Tensor:
        """Hidden states of no sequence.

        Raises:
            UserError: There is a sequence.
        """
        if sequences:
            raise UserError(
                f"the model {self.name} is not loaded (cache.only=true), and its scores of {len(sequences)} of the "
                f"completions asked for are not in the cache; `retort score DATA --teacher {self.name} --student ... "
                "--method ... --cache ...` stores those of the data, and with cache.only=false the model is loaded"
            )
        weight_VD = self.head().weight_VD
        return weight_VD.new_zeros(0, weight_VD.shape[1])

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        """See `LanguageModel`."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            yield


def save_stored(lm: LanguageModel, folder: Path, digests: Mapping[str, str], fingerprint: str) -> None:
    """Writes what `load_stored` reads into a folder that exists: the weights of the head, and small files.

    Args:
        lm: The model.
        folder: An empty folder.
        digests: Its `digests_of`.
        fingerprint: Its `fingerprint_of`.

    Raises:
        OSError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    head = lm.head()
    parts = {"weight": head.weight_VD, "bias": head.bias_V}
    save_file(
        {name: part.detach().cpu().contiguous().clone() for name, part in parts.items() if part is not None},
        folder / HEAD,
    )
    lm.model.config.save_pretrained(folder)
    lm.save_tokens(folder)
    record = {
        "fingerprint": fingerprint,
        "name": lm.name,
        "digests": dict(digests),
        "sample": lm.digest(),
        "stops": [lm.stops.primary, *sorted(lm.stops.ids - {lm.stops.primary})],
        "precision": lm.precision,
        "elsewhere": not lm.here,
        "rounded": lm.rounded,
    }
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
    for path in folder.iterdir():
        flush(path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a stored model; None where the folder holds no whole one."""
    try:
        found = parse_object((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    kinds = {"fingerprint": str, "name": str, "digests": dict, "sample": str, "stops": list, "precision": str}
    return found if all(isinstance(found.get(key), kind) for key, kind in kinds.items()) else None


def load_stored(folder: Path, name: str, role: str, device: torch.device, *, trust_remote_code: bool) -> StoredModel:
    """Reads a stored model.

    Args:
        folder: What `save_stored` wrote.
        name: The user's name for it, for messages.
        role: Its role, for messages.
        device: Device of the head.
        trust_remote_code: Run code that came with the model's configuration.

    Raises:
        UserError: The folder is damaged.
    """
    import transformers
    from safetensors.torch import load_file

    label = f"{role} {name}"
    record = read_record(folder)
    if record is None:
        raise UserError(f"{label}: {folder / RECORD} is missing or damaged; remove that folder, and score again")
    tokenizer = read_tokenizer(name, str(folder), role, trust_remote_code=trust_remote_code)
    seen = find_processor(label, name, str(folder), trust_remote_code=trust_remote_code)
    if isinstance(seen, ImageProcessing):
        tokenizer = seen.adopt(tokenizer)
    precision: Precision = "bf16" if record["precision"] == "bf16" else "fp32"
    with errors_about(f"{label}: what the cache keeps of it"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            images = seen is not None
            kind = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
            model: Any = kind.from_config(config, trust_remote_code=trust_remote_code)
        layer, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = embedding.weight is layer.weight
        for part, tensor in load_file(folder / HEAD, device=str(device)).items():
            setattr(layer, part, torch.nn.Parameter(tensor, requires_grad=False))
        if tied:
            embedding.weight = layer.weight
    model.requires_grad_(False).eval()
    primary, *others = (int(i) for i in record["stops"])
    return StoredModel(
        model,
        tokenizer,
        StopTokens(frozenset({primary, *others}), primary),
        name,
        precision,
        transformers.GenerationConfig(),
        rounded=str(record.get("rounded", "")),
        digests={str(what): str(digest) for what, digest in record["digests"].items()},
        fingerprint=record["fingerprint"],
        sample=record["sample"],
        image_tokens=seen,
        elsewhere=record.get("elsewhere") is True,
    )
