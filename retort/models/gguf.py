"""GGUF files: the content of their header, and how transformers reads them.

transformers converts the weights to plain numbers in memory; nothing is kept on disk. Reading a large vocabulary takes
it many seconds each time, so configuration and tokenizer are kept in memory for as long as the process lives.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from retort.models.gguf_reader import fast_reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
#: Formats of values of fixed size, by their type in the header; 8 is a text and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
#: Types of tensors that hold plain numbers.
_PLAIN = ("F32", "F16", "BF16", "F64")
#: The rule by which transformers splits text where it knows none of the file's name.
_GPT2 = "gpt-2"
#: A rule that transformers does not know, and that is GPT-2's after each digit stands alone.
_SINGLE_DIGITS = "smollm"
#: A rule of which transformers leaves out that characters are composed first (NFC), as Qwen's tokenizers do.
_COMPOSED = "qwen2"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file stores it: its name, its type in `gguf`, its elements, and the place of its first byte."""

    name: str
    kind: int
    elements: int
    start: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: Its values by key; of an array only the number of elements.
        tensors: Its tensors.
    """

    metadata: Mapping[str, Any]
    tensors: Sequence[StoredTensor]

    @property
    def quantisation(self) -> str | None:
        """The type of quantisation by its usual name, such as Q4_K_M; None where all weights are plain numbers."""
        from gguf import GGMLQuantizationType, LlamaFileType

        sizes = Counter[str]()
        for tensor in self.tensors:
            sizes[GGMLQuantizationType(tensor.kind).name] += tensor.elements
        rounded = [name for name, _ in sizes.most_common() if name not in _PLAIN]
        if not rounded:
            return None
        try:
            named = LlamaFileType(self.metadata.get("general.file_type")).name
        except ValueError:  # the header names none, or a newer one
            return rounded[0]
        return named.removeprefix("MOSTLY_") if named.startswith("MOSTLY_") else rounded[0]


def is_gguf(location: str) -> bool:
    """Whether a location is a GGUF file, by its name."""
    path = Path(location)
    return path.suffix.lower() == ".gguf" and path.is_file()


def wrong_with(path: Path) -> str | None:
    """The reason why a GGUF file cannot be read, as far as its header shows; None where there is none."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return "that is no GGUF file, whatever its name says: it does not begin with GGUF; copy it again"
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        return f"a GGUF file needs {' and '.join(lacking)}: pip install 'retort-distill[gguf]'"
    try:
        found = header(str(path))
        end = max((tensor.start + _size(tensor) for tensor in found.tensors), default=0)
    except (ValueError, KeyError, TypeError, struct.error, ArithmeticError, EOFError, MemoryError) as error:
        return f"its header cannot be read ({type(error).__name__}): it is cut off, damaged or too new; copy it again"
    parts = _parts(path, found.metadata)
    if parts is not None:
        return parts
    there = path.stat().st_size
    if not found.tensors:
        return "that GGUF file holds no weights (a vocabulary only?)"
    if there < end:
        return f"that file is cut off: {there:,} of {end:,} bytes are there; copy it again"
    return None


def header(location: str) -> Header:
    """Reads the header of a file, once for each state of it."""
    path = Path(location)
    state = path.stat()
    return _header(str(path), state.st_mtime_ns, state.st_size)


def read_config(location: str) -> Any:
    """The configuration of a file's model, as transformers reads it; a copy."""
    return copy.deepcopy(_read(location)[0])


def read_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, as transformers reads it, with its rule for splitting text put right; a copy."""
    return copy.deepcopy(_read(location)[1])


def arguments(location: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that open a file."""
    path = Path(location)
    return {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "config": read_config(location),
    }


def without_leftovers(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model that was read from a file an ordinary one, which learns and is saved: its weights are numbers."""
    held = cast("Any", model)
    for config in (held.config, held.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    held.hf_quantizer = None
    held.is_quantized = False
    held.config.name_or_path = ""  # or it would be the folder of the file, which is no model
    return model


def notes(location: str) -> list[str]:
    """Notes on parts of a file that transformers does not follow."""
    found = header(location)
    rule, known = _split_rule(found.metadata), _known_rules()
    said = list[str]()
    if rule is not None and rule not in known:
        said.append(
            f"text is split as GPT-2 does, because transformers does not know the file's rule ({rule}): tokens may "
            "differ from those that the model was trained on (docs/gguf.md)"
        )
    if any(tensor.name == "rope_freqs.weight" for tensor in found.tensors):
        said.append("the file stretches rotary positions (rope_freqs.weight), which transformers leaves out")
    return said


def rounded(location: str) -> str:
    """How the weights of a location were rounded, in words; empty where they were not, or it is no GGUF file."""
    path = str(Path(location).expanduser())
    kind = header(path).quantisation if is_gguf(path) else None
    return f"quantised to {kind} (GGUF)" if kind else ""


def licence(location: str) -> str | None:
    """The licence that the header names."""
    found = header(location).metadata.get("general.license")
    return found if isinstance(found, str) else None


def _read(location: str) -> tuple[Any, Any]:
    path = Path(location)
    state = path.stat()
    return _read_once(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read_once(location: str, _changed: int, _size: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    path = Path(location)
    with fast_reader():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer = cast("Any", AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name))
    tokenizer = _put_right(tokenizer, _split_rule(header(location).metadata))
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int):
        tokenizer.model_max_length = context
    return config, tokenizer


def _put_right(tokenizer: Any, rule: str | None) -> Any:
    """The tokenizer with the rule of its file, in the class that saves its rules and reads them back.

    The classes of some families (Qwen's, Gemma's) make their own rules whenever a tokenizer is opened, so that what was
    saved would read text differently.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rules = tokenizer.backend_tokenizer
    if rule == _SINGLE_DIGITS:
        rules.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if rule == _COMPOSED:
        rules.normalizer = normalizers.NFC()
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    )


def _split_rule(metadata: Mapping[str, Any]) -> str | None:
    """The name of the rule by which text is split before merging; None for a tokenizer that has no such rule."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    return str(metadata.get("tokenizer.ggml.pre", "default"))


def _known_rules() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # it is no public name
        return {_GPT2, _SINGLE_DIGITS}
    return {_GPT2, _SINGLE_DIGITS, *GGUF_PRE_TOKENIZER_SPLITS}


def _parts(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """The reason why one of several files that hold a model together cannot be read."""
    count, matched = metadata.get("split.count", 0), _PART.search(path.stem)
    if not isinstance(count, int) or count <= 1:
        return None
    whole = f"that is one of {count} files that hold the model together"
    if matched is not None:
        start = path.stem[: matched.start()]
        names = [f"{start}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1)]
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            return f"{whole}, and {len(missing)} of them are missing ({missing[0]}); copy them, then merge them"
    return f"{whole}, which transformers does not read; merge them first (llama-gguf-split --merge FIRST WHOLE)"


def _size(tensor: StoredTensor) -> int:
    """Bytes of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return tensor.elements // block * size


@lru_cache(maxsize=8)
def _header(location: str, _changed: int, size: int) -> Header:
    with Path(location).open("rb") as file:
        reader = _Reader(file, size)
        file.seek(len(_MAGIC))
        version, tensors, values = reader.unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        metadata = dict[str, Any]()
        for _ in range(values):
            key = reader.text()
            metadata[key] = reader.value(*reader.unpack("I"))
        table = [reader.tensor() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-file.tell() // alignment) * alignment
    placed = [StoredTensor(name, kind, elements, start + offset) for name, kind, elements, offset in table]
    return Header(metadata, placed)


@dataclass(frozen=True)
class _Reader:
    """Reads values of the format one after another."""

    file: BinaryIO
    size: int

    def read(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            raise EOFError
        return self.file.read(length)

    def unpack(self, formats: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{formats}", self.read(struct.calcsize(f"<{formats}")))

    def text(self) -> str:
        return self.read(*self.unpack("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.unpack(_FORMATS[kind])[0]
        inner, count = self.unpack("IQ")
        if inner in _FORMATS:
            self.read(count * struct.calcsize(f"<{_FORMATS[inner]}"))
            return count
        if inner != _TEXT:
            raise ValueError(f"an array of type {inner}")
        for _ in range(count):
            self.read(*self.unpack("Q"))
        return count

    def tensor(self) -> tuple[str, int, int, int]:
        name = self.text()
        (axes,) = self.unpack("I")
        if axes > 8:
            raise ValueError(f"{axes} axes")
        shape = self.unpack(f"{axes}Q")
        kind, offset = self.unpack("IQ")
        return name, kind, math.prod(shape), offset
