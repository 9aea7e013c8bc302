"""A pair with Qwen3's vocabulary and random weights, so that a benchmark of the head needs nothing from a hub."""

from __future__ import annotations

import random
from pathlib import Path

import torch

VOCAB = 151_936
#: Qwen3-0.6B's proportions: two heads to one key-value head, and three times the width in the feed-forward layer.
SHAPES = {"student": (512, 8), "teacher": (768, 12)}


def build_pair(folder: Path, *, vocab: int = VOCAB, shapes: dict[str, tuple[int, int]] | None = None) -> None:
    """Writes `student` and `teacher` into `folder`: Qwen3 with tied embeddings, and a tokenizer of numbered words."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(vocab)
    for seed, (role, (width, layers)) in enumerate((shapes or SHAPES).items()):
        torch.manual_seed(seed)
        heads = max(2, width // 64)
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
        model = Qwen3ForCausalLM(config)
        model.generation_config.eos_token_id = 0
        model.generation_config.pad_token_id = 0
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def build_tokenizer(vocab: int):
    """Words w1, w2, ... and one stop. A random model gives the stop one in `vocab`, so nearly all answers are full."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    inner = Tokenizer(WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left", model_max_length=512
    )


def prompts(count: int, length: int, vocab: int = VOCAB) -> tuple[str, ...]:
    """Random words."""
    drawn = random.Random(0)
    return tuple(" ".join(f"w{drawn.randrange(1, vocab)}" for _ in range(length)) for _ in range(count))
