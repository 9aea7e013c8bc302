"""Models and tokenizers made on the spot, for all tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retort.core.rollouts import Group, Prompt, Rollout
from retort.core.sequences import TokenSequence

WORDS = [str(number) for number in range(40)] + list("+-*=,:()") + ["from", "so", "the", "answer", "is", "add", "and"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_tokenizer(
    *, eos: str = "<eos>", chat: bool = False, words: list[str] | None = None, renumbered: int | None = None
) -> Any:
    """A word-level tokenizer in memory; `renumbered` is the seed of other ids for the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    known = [*specials, *(words or WORDS)]
    vocabulary = dict(zip(known, _order(len(known), renumbered).tolist(), strict=True))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHATML
    return fast


def _order(count: int, renumbered: int | None) -> torch.Tensor:
    """The id of each token, [V]."""
    if renumbered is None:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(renumbered))


def make_model(
    folder: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    padded_to: int | None = None,
    eos: str = "<eos>",
    chat: bool = False,
    words: list[str] | None = None,
    renumbered: int | None = None,
    **settings: Any,
) -> Path:
    """A random-weight model folder of a family, with its tokenizer; `renumbered` gives its tokens other ids."""
    import transformers

    tokenizer = make_tokenizer(eos=eos, chat=chat, words=words, renumbered=renumbered)
    shape = {
        "vocab_size": padded_to or len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **settings,
    }
    classes = {
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
        "cohere": ("CohereConfig", "CohereForCausalLM"),
        "granite": ("GraniteConfig", "GraniteForCausalLM"),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    }
    config_name, model_name = classes[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.35)
        order_V = _order(len(tokenizer), renumbered)
        for weight_VD in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight_VD[order_V] = weight_VD[: len(order_V)].clone()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_narrower(folder: Path, source: Path, width: int) -> Path:
    """The model of a folder with this many rows of embeddings, and its tokenizer, in another folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(width)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def tiny_settings(model_folder: Callable[..., Path], prompts_file: Path) -> dict[str, Any]:
    """Settings of a run of a second or two: random models on real arithmetic."""
    return {
        "student": str(model_folder(seed=1)),
        "teacher": str(model_folder(seed=2, hidden_size=24, padded_to=64)),
        "data": str(prompts_file),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "warn",  # random weights, and meant to be
        "steps": 4,
        "rollout": {"prompts": 4, "max_new_tokens": 6, "max_prompt_tokens": 32},
        "optimizer": {"learning_rate": 1e-2, "updates": 2, "batch_tokens": 64},
        "eval": {"problems": 4, "samples": 2, "top_p": 1.0, "max_new_tokens": 6},
        "checkpoint": {"every": 2},
    }


def group_of(prompt: Prompt, texts: Sequence[str]) -> Group:
    """Rollouts of these texts to a prompt, for whoever looks at nothing but texts."""
    sequence = TokenSequence.of([0]).then([1], decided=True)
    return tuple(Rollout(prompt, sequence, member=member, text=text) for member, text in enumerate(texts))
