"""Make the bundled teacher and student of ranked lists from nothing.

    python -m retort.tasks.ranking.build --out models

saves ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers measured in
this very run. Both learn by supervised learning on right responses. The student is smaller and is stopped while it
still breaks the list now and then, so that there is structure left to learn (the paper's "parse headroom").
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retort.align.text import decode
from retort.tasks.ranking.lists import ITEMS, problem, rows, score_list
from retort.tasks.ranking.tokenizer import EOS, build_tokenizer

MAX_NEW_TOKENS = 10 * max(ITEMS) + 2 + 6  # the list, the end token, and some room for mistakes
MEASURED = 256

# Axes: B sequences, L tokens of a sequence, V words.


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        hidden, layers, wide: Shape of the model.
        steps: Optimizer steps.
        parse: Parse rate at which to stop early.
        batch: Sequences per step.
        lr: Highest learning rate; a cosine decays it to zero.
        seed: Seed of initial weights and data.
    """

    hidden: int
    layers: int
    wide: int
    steps: int
    parse: float = 2.0
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0


TEACHER = Recipe(hidden=64, layers=3, wide=128, steps=900)
STUDENT = Recipe(hidden=48, layers=2, wide=96, steps=1500, parse=0.3, seed=1)


@dataclass(frozen=True)
class Score:
    """Scores on held-out problems, one sample each at temperature 1."""

    parse: float
    ndcg: float
    one_missing: float


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A freshly initialised model in fp32."""
    torch.manual_seed(recipe.seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.wide,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=recipe.hidden // 4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,  # at the usual 0.02 a model this narrow takes thousands of steps to learn to copy at all
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of the response tokens, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, word, started = random.Random(f"ranking build {recipe.seed}"), tokenizer.get_vocab(), time.monotonic()
    held_out = {row["prompt"] for row in rows("held_out", None)}
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        texts: list[str] = []
        items = rng.choice(ITEMS)  # one number of items in a batch, so that all have one length
        while len(texts) < recipe.batch:
            one = problem(rng, items)
            if one.prompt not in held_out:
                texts.append(f"{one.prompt} {one.response} {tokenizer.eos_token}")
        tokens_BL = torch.tensor([[word[part] for part in text.split()] for text in texts])
        prompt = 2 * items + 2
        logits_BLV = model(input_ids=tokens_BL[:, :-1]).logits[:, prompt - 1 :]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == recipe.steps:
            score = measure(model, tokenizer)
            if step % 100 == 0:
                print(f"  step {step}, {time.monotonic() - started:.0f} s, loss {loss.item():.4f}, {score}", flush=True)
            if score.parse >= recipe.parse:
                print(f"  stopped at step {step}: {score}", flush=True)
                return


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts_BL: Tensor, generator: torch.Generator) -> Tensor:
    """New tokens at temperature 1, [B, MAX_NEW_TOKENS]; tokens after the end token are to be ignored."""
    cache, tokens, drawn = DynamicCache(config=model.config), prompts_BL, list[Tensor]()
    for _ in range(MAX_NEW_TOKENS):
        logits_BLV = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = torch.multinomial(logits_BLV[:, -1].float().softmax(-1), 1, generator=generator)
        drawn.append(tokens)
    return torch.cat(drawn, 1)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Score:
    """The score of ``model`` on the same held-out problems and with the same seed every time."""
    prompts = sorted((str(row["prompt"]) for row in rows("held_out", MEASURED)), key=len)
    generated: list[list[int]] = []
    for items in ITEMS:
        alike = torch.tensor(tokenizer([text for text in prompts if len(text.split()) == 2 * items + 2]).input_ids)
        generated += sample(model, alike, torch.Generator().manual_seed(items)).tolist()
    found, stop = [], tokenizer.get_vocab()[EOS]
    for prompt, ids in zip(prompts, generated, strict=True):
        end = ids.index(stop) if stop in ids else len(ids)
        text = decode(tokenizer, ids[:end])
        found.append(score_list(prompt, str(text)))
    good = [one.ndcg for one in found if one.ndcg is not None]
    missing = sum(one.one_missing for one in found) / len(found)
    return Score(len(good) / len(found), sum(good) / max(1, len(good)), missing)


def card(name: str, how: str, score: Score, parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    return f"""---
license: apache-2.0
library_name: transformers
tags: [structured-output, on-policy-distillation]
---

# Ranked lists {name}

A Llama-style model of {parameters:,} parameters that reads items with their places and writes them as a JSON list in
order. It is the {name} of Retort's built-in structured-output task, and good for nothing else.

| on {MEASURED} held-out problems of {min(ITEMS)} to {max(ITEMS)} items, one sample each, temperature 1 | |
|---|---|
| parses (a list of all items, each once) | {score.parse:.1%} |
| NDCG@1 of those that parse | {score.ndcg:.3f} |
| one item missing, else right | {score.one_missing:.1%} |

## How it was made

{how} No held-out problem is in its training data. The weights are stored in bfloat16; the scores are those of the
stored weights, loaded again into float32.

    python -m retort.tasks.ranking.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def make(name: str, recipe: Recipe, out: Path) -> None:
    """Train a model, save it to ``out/name``, and measure the saved one."""
    tokenizer, folder = build_tokenizer(), out / name
    model = build_model(tokenizer, recipe)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    train(model, tokenizer, recipe)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    score = measure(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    until = f" or until {recipe.parse:.0%} of its lists parse" if recipe.parse <= 1 else ""
    how = (
        f"From random weights, by supervised learning on right responses: at most {recipe.steps:,} steps{until}, "
        f"{recipe.batch} sequences a step, AdamW with a cosine from {recipe.lr:g}, seed {recipe.seed}; "
        f"{recipe.layers} layers of width {recipe.hidden}."
    )
    (folder / "README.md").write_text(card(name, how, score, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: {score}, {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled teacher and student of ranked lists.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=("teacher", "student"), help="make only this one")
    arguments = parser.parse_args()
    for name, recipe in (("teacher", TEACHER), ("student", STUDENT)):
        if arguments.only in (None, name):
            make(name, recipe, arguments.out)


if __name__ == "__main__":
    main()
