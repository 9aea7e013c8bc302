"""Tokenizers of every kind, trained on the spot on a few lines: small vocabularies, real algorithms."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

LINES = [
    "The quick brown fox doesn't jump over the lazy dog; it's 3:45 p.m.",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # squared\n\n\n    if a != b:\r\n        pass",
    "1234567890 3.14159 -42 1,000,000 2+2=4",
    "Größe, naïve façade, Привет мир, 你好世界, 你好, नमस्ते, مرحبا, 한국어",
    "the answer is the answer, and the fox is the fox",
] * 3
SINGLES = [f"<0x{byte:02X}>" for byte in range(256)]
#: Tokens that every one has besides its words: one for unknown text, two that end a turn, one that only some know.
SPECIAL = ["<unk>", "<s>", "</s>", "<end>"]

#: Names of the kinds. Those of `REVERSIBLE` spell every text exactly.
REVERSIBLE = ("bytes", "byte-level", "gemma", "llama", "unigram")
NORMALISING = ("qwen", "t5", "bert")
KINDS = (*REVERSIBLE, *NORMALISING)


@lru_cache
def trained(kind: str, name: str = "") -> Any:
    """A tokenizer of a kind; `name` gives it a control token of its own."""
    made = _MAKERS[kind]()
    made.add_special_tokens([*SPECIAL, *([f"<{name}>"] if name else [])])
    # An added word that is text, and one that is text although its characters stand for bytes elsewhere.
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def _byte_level(size: int, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _sentencepiece(dummy: bool) -> Tokenizer:
    """BPE over characters, `▁` for blanks, single bytes for what it does not know."""
    blanks = normalizers.Replace(" ", "▁")
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if dummy else blanks
    made.train_from_iterator(
        LINES[:3] * 4, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(made.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for single in SINGLES:
        vocabulary.setdefault(single, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    made.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if dummy else parts)
    return made


def _unigram(*, byte_fallback: bool, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    )
    if byte_fallback:
        vocabulary = [tuple(item) for item in json.loads(made.to_str())["model"]["vocab"]]
        made.model = models.Unigram([*vocabulary, *((single, -20.0) for single in SINGLES)], 0, True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )
    return made


def _with_beginning() -> Tokenizer:
    """Byte-level with another vocabulary, and a beginning of its own."""
    made = _byte_level(400)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


_MAKERS = {
    "bytes": lambda: _byte_level(256),
    "byte-level": _with_beginning,
    "gemma": lambda: _sentencepiece(False),
    "llama": lambda: _sentencepiece(True),
    "unigram": lambda: _unigram(byte_fallback=True),
    "qwen": lambda: _byte_level(330, normalizers.NFC()),
    "t5": lambda: _unigram(byte_fallback=False, normalizer=normalizers.NFKC()),
    "bert": _wordpiece,
}


def make_model_of(folder: Path, kind: str, *, seed: int, width: int = 16, layers: int = 1, scale: float = 0.3) -> Path:
    """A folder with a tokenizer of a kind and a model of random weights, which has more rows than there are ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = trained(kind)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=scale,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Letters(PreTrainedTokenizer):
    """A slow tokenizer: a token for each letter, of which it knows only lower-case ones."""

    def __init__(self, **settings: Any) -> None:
        self._known = {one: index for index, one in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,!"])}
        super().__init__(unk_token="<unk>", eos_token="</s>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self._known)

    def get_vocab(self) -> dict[str, int]:
        return self._known | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text.lower())

    def _convert_token_to_id(self, token: str) -> int:
        return self._known.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._known)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def slow() -> list[Any]:
    """Tokenizers without a backend: letters, and the bytes of a whole character."""
    return [Letters(), ByT5Tokenizer()]
