"""Tiny GGUF files, written with the package `gguf`: random weights, a trained byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support import CHATML
from trained import trained

#: transformers takes the heads of every Qwen3 file to be this large.
HEAD = 128


def tiny_qwen3(seed: int, layers: int = 2) -> Any:
    """A random model whose axes are multiples of the 32 elements that are rounded together."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = trained("byte-level")
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2)
    return model


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    rounded: str = "Q8_0",
    architecture: str = "qwen3",
    rule: str | None = "gpt-2",
    chat: bool = False,
    without: str = "",
    parts: int = 0,
) -> Path:
    """Writes a random Qwen3 as a GGUF file.

    Args:
        path: The file.
        seed: Seed of the weights.
        rounded: Type of the matrices, in `gguf`.
        architecture: What the header calls it.
        rule: The rule for splitting text that the header names.
        chat: Whether the header has a chat template, of which `<end>` ends a turn.
        without: A tensor to leave out, by its name in the file.
        parts: Number of files that the header says hold the model together; 0 says nothing.
    """
    import gguf

    model, tokenizer = tiny_qwen3(seed), trained("byte-level")
    config, kind = model.config, gguf.GGMLQuantizationType[rounded]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if rounded == 'F32' else 'MOSTLY'}_{rounded}"])
    if parts:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer, tokenizer, rule, chat)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for own, tensor in model.state_dict().items():
        name, values = names.get_name(own, try_suffixes=(".weight",)), tensor.numpy()
        if name == without:
            continue
        if tensor.ndim == 2 and kind.name != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, rule: str | None, chat: bool) -> None:
    import gguf

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    control = {*tokenizer.all_special_tokens, "<end>"}
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<end>" if chat else "</s>"))
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(False)
    if chat:
        writer.add_chat_template(CHATML.replace("<|im_end|>", "<end>"))
