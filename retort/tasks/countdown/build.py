"""Make the bundled Countdown teacher and student from nothing: supervised learning on random right responses.

    python -m retort.tasks.countdown.build --out models

writes ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers
measured in this very run. The student is smaller and stops early, while its learning rate is still high: it
knows the format and part of the arithmetic, and has much left to learn from the teacher.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from retort.tasks.countdown.problems import check, problems, rows, solutions
from retort.tasks.countdown.tokenizer import build_tokenizer

NUMBERS = 3
MAX_NEW_TOKENS = 14  # a right response is 11 tokens and the end token
MEASURED_PROBLEMS = 320
SAMPLES = 8

# Axes: B sequences, L tokens of a sequence, V words, P problems, K samples of one problem.


@dataclass(frozen=True)
class Recipe:
    """The shape of one model and how it is trained.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads.
        inner: width of the feed-forward part.
        steps: optimizer steps taken.
        schedule: optimizer steps over which the cosine brings the learning rate to zero.
        batch: sequences per step.
        lr: highest learning rate.
        weight_decay: of AdamW; large, because there are only some 3,000 training problems to learn from.
        seed: decides initial weights and data order.
    """

    hidden: int
    layers: int
    heads: int
    inner: int
    steps: int
    schedule: int
    batch: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.4
    seed: int = 0


RECIPES = {
    "teacher": Recipe(hidden=128, layers=4, heads=4, inner=512, steps=5000, schedule=5000),
    "student": Recipe(hidden=96, layers=3, heads=4, inner=256, steps=600, schedule=2400, seed=1),
}


@dataclass(frozen=True)
class Score:
    """Accuracy on held-out problems at temperature 1: mean over samples, and at least one right of eight."""

    avg_at_8: float
    pass_at_8: float


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model in fp32."""
    torch.manual_seed(recipe.seed)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        intermediate_size=recipe.inner,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",  # at this size faster than sdpa on a CPU
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches of token ids, [B, L]: random training problems, number orders and right responses."""
    rng = random.Random(recipe.seed)
    word = tokenizer.get_vocab()
    pool = [(problem, solutions(problem)) for problem in problems("train", NUMBERS)]
    while True:
        texts: list[str] = []
        for problem, found in rng.choices(pool, k=recipe.batch):
            shown = type(problem)(tuple(rng.sample(problem.numbers, NUMBERS)), problem.target)
            texts.append(f"{shown.prompt} {rng.choice(found)} {tokenizer.eos_token}")
        yield torch.tensor([[word[part] for part in text.split()] for text in texts])  # all have the same length


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of the response tokens, bf16 autocast, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    prompt = NUMBERS + 3
    start = time.monotonic()
    data = batches(tokenizer, recipe)
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.schedule))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens_BL = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BLV = model(input_ids=tokens_BL[:, :-1]).logits[:, prompt - 1 :]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == recipe.steps:
            score, spent = measure(model, tokenizer), time.monotonic() - start
            print(f"  step {step} of {recipe.steps}, {spent:.0f} s, loss {loss.item():.4f}, {score}", flush=True)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts_BL: Tensor, generator: torch.Generator) -> Tensor:
    """New tokens at temperature 1, [B, MAX_NEW_TOKENS]; what follows the end token is to be ignored."""
    cache, tokens, drawn = DynamicCache(config=model.config), prompts_BL, list[Tensor]()
    for _ in range(MAX_NEW_TOKENS):
        logits_BLV = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = torch.multinomial(logits_BLV[:, -1].float().softmax(-1), 1, generator=generator)
        drawn.append(tokens)
    return torch.cat(drawn, 1)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Score:
    """The score of ``model`` on the same held-out problems and with the same seed every time."""
    model.eval()
    prompts = [row["prompt"] for row in rows("held_out", MEASURED_PROBLEMS, numbers=NUMBERS)]
    encoded = torch.tensor(tokenizer(prompts).input_ids).repeat_interleave(SAMPLES, 0)
    right: list[bool] = []
    for at, tokens in enumerate(sample(model, encoded, torch.Generator().manual_seed(0)).tolist()):
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else 0  # no end is wrong
        right.append(check(prompts[at // SAMPLES], tokenizer.decode(tokens[:end])))
    right_PK = torch.tensor(right).view(-1, SAMPLES)
    return Score(right_PK.float().mean().item(), right_PK.any(1).float().mean().item())


def card(name: str, recipe: Recipe, score: Score, parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    return f"""---
license: apache-2.0
library_name: transformers
tags: [countdown, on-policy-distillation]
---

# Countdown {name}

A Llama-style model of {parameters:,} parameters that plays Countdown: it reads `45 from 3 5 12 :` and writes
`12 - 3 = 9 , 9 * 5 = 45`. It is the {name} of Retort's built-in task, and good for nothing else.

| on {MEASURED_PROBLEMS} held-out problems of {NUMBERS} numbers, {SAMPLES} samples each, temperature 1 | |
|---|---|
| avg@8 (a sample is right) | {score.avg_at_8:.1%} |
| pass@8 (at least one of eight is right) | {score.pass_at_8:.1%} |

## How it was made

From random weights, by supervised learning on random right responses to the training problems. No held-out
problem occurs there in any order of its numbers.

- {recipe.layers} layers of width {recipe.hidden}, {recipe.heads} heads, feed-forward {recipe.inner}
- input and output embeddings tied
- {recipe.steps} steps of {recipe.batch} sequences, cosine over {recipe.schedule} steps, bf16 autocast
- AdamW, highest learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}, seed {recipe.seed}
- weights stored in bfloat16; the scores are those of the stored weights, loaded again into float32

    python -m retort.tasks.countdown.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def build(name: str, out: Path) -> Score:
    """Train one model, write it to ``out/name``, and measure what was written."""
    recipe, tokenizer, folder = RECIPES[name], build_tokenizer(), out / name
    model = build_model(recipe, tokenizer)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    train(model, tokenizer, recipe)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    score = measure(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    (folder / "README.md").write_text(card(name, recipe, score, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(
        f"{name}: avg@8 {score.avg_at_8:.1%}, pass@8 {score.pass_at_8:.1%}, {size:.1f} MB in {folder}",
        flush=True,
    )
    return score


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled Countdown teacher and student.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=sorted(RECIPES), help="make only this one")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else RECIPES:
        build(name, arguments.out)


if __name__ == "__main__":
    main()
