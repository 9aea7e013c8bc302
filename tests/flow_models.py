"""Tiny pipelines of diffusers with random weights: as Stable Diffusion 3 and as Flux are built, down to tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

#: Words that the tokenizers know; anything else is spelt.
WORDS = ("red", "blue", "green", "letter", "picture", "of", "a", "the", "an", "b", "c")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> Any:
    """A tokenizer of CLIP: letters, and nothing merged."""
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """A tokenizer of T5: whole words, and letters."""
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *LETTERS]
    return T5TokenizerFast(vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)], extra_ids=0)


def clip_encoder(*, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=77,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_encoder(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=48, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def autoencoder(channels: int) -> Any:
    """Images are four times as high as latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def sd3(**scheduler: Any) -> Any:
    """As Stable Diffusion 3 is built; latents [4, 8, 8], images of 32 px."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=12,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=_lively(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=autoencoder(4),
            text_encoder=clip_encoder(projected=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(projected=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(32),
            tokenizer_3=t5_tokenizer(),
        )
    return _quiet(pipeline)


def flux(*, guidance_embeds: bool = True, **scheduler: Any) -> Any:
    """As Flux is built; latents [4, 8, 8], packed to [16, 16] for its transformer, images of 32 px."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=8,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        )
        pipeline = FluxPipeline(
            transformer=_lively(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
            vae=autoencoder(4),
            text_encoder=clip_encoder(projected=False),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(32),
            tokenizer_2=t5_tokenizer(),
        )
    return _quiet(pipeline)


def made(pipeline: Any, folder: Path) -> Path:
    """Saves a pipeline in a folder."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _lively(transformer: Any) -> Any:
    """Gives every weight a size: the last layers of new transformers are zeros, and would hide all others."""
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return transformer


def _quiet(pipeline: Any) -> Any:
    """Without progress bars, and without dropout, which a new model has until it is read from a folder."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def small(*, width: int = 16, seed: int = 0) -> Any:
    """A small flow of images of 8 px, float64, whose every weight has a size.

    It is frozen, as an adapter's base is: torch rounds products of weights that learn otherwise.
    """
    from retort.flows.small import SmallConfig, SmallFlow

    flow = SmallFlow.new(SmallConfig(latent_shape=(3, 8, 8), words=("ring", "moon"), width=width), seed=seed)
    flow.module.double().requires_grad_(False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for weight in flow.module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator).double() * 0.1)
    return flow


def tuned(adapter: Any, seed: int) -> Any:
    """Gives an adapter's factors a size, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.tensors.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return adapter
