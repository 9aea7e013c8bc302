"""Tiny image-text models with random weights, in folders as a user has them: model, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def make_image_model(folder: Path, family: str, *, seed: int = 0, biases: float = 0.0, **settings: Any) -> Path:
    """A random-weight model folder of an image-text family, with its tokenizer and its processor.

    Args:
        folder: An empty folder.
        family: One of `FAMILIES`.
        seed: Of the weights.
        biases: Their size. Those of keys have no gradient, so where they are 0 nothing but rounding is left of them.
        settings: Further ones of the image processor.
    """
    torch.manual_seed(seed)
    processor, model = _MAKERS[family](settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3)
        for name, parameter in model.named_parameters():
            if biases and name.endswith("bias"):
                parameter.normal_(0.0, biases)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def byte_tokenizer(specials: list[str], placeholder: str) -> Any:
    """A tokenizer with a token for each byte, and one for two line breaks; its template writes `placeholder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>", *specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE.replace("IMAGE", placeholder)
    return fast


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**TEXT, "vocab_size": len(tokenizer), **ids, **more}


def _llava(settings: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    tokenizer = byte_tokenizer(["<image>"], "<image>")
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**sides, **settings),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    kind: Any = transformers.LlavaConfig
    config = kind(
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def _idefics3(settings: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    rows = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    own = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = byte_tokenizer([*own, *rows], "<image>")
    sides = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(**sides, **settings),
        tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    )
    kind: Any = transformers.Idefics3Config
    config = kind(
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return processor, transformers.Idefics3ForConditionalGeneration(config)


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def make(settings: dict[str, Any]) -> tuple[Any, Any]:
        import transformers

        own = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        tokenizer = byte_tokenizer(own, "<|vision_start|><|image_pad|><|vision_end|>")
        size = {"shortest_edge": 64, "longest_edge": 1024}
        images = transformers.Qwen2VLImageProcessorPil(
            size=size, patch_size=4, merge_size=2, temporal_patch_size=2, **settings
        )
        processor = images_only(getattr(transformers, f"{kind}Processor"))(
            images, tokenizer, chat_template=tokenizer.chat_template
        )
        ids = dict(
            zip(
                ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                map(tokenizer.convert_tokens_to_ids, own),
                strict=True,
            )
        )
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision,
            text_config={**_text(tokenizer, rope_parameters=rope), **text},
            tie_word_embeddings=False,
            **ids,
        )
        return processor, getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return make


def images_only(kind: Any) -> Any:
    """A class of processors without its video part, under its own name: that part needs torchvision."""
    parts = [name for name in kind.get_attributes() if "video" not in name]
    return type(
        kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts), "__module__": kind.__module__}
    )


_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MAKERS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "qwen2_vl": _qwen(
        "Qwen2VL", {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, **_PATCHES}, {}
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VL",
        {
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            **_PATCHES,
        },
        {},
    ),
    "qwen3_vl": _qwen(
        "Qwen3VL",
        {
            "depth": 3,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            **_PATCHES,
        },
        {},
    ),
}
