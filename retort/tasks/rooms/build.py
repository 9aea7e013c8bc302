"""Make the bundled teacher and student of Rooms from nothing.

    python -m retort.tasks.rooms.build --out models

saves ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers measured in
this very run. The teacher is made first, by supervised learning on the expert's own turns: from games without mistakes,
then from games that have mistakes in them, so that it knows the way back from places where the expert never goes by
itself. The student goes on from there, and learns to play like somebody careless, who errs at times and, once that has
happened, most of the time. It is a model that could do better: distillation has to bring back what it has unlearnt.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retort.tasks.rooms.episodes import Turn, games, played, rows, seed_of
from retort.tasks.rooms.game import Rooms
from retort.tasks.rooms.tokenizer import ASSISTANT, EOS, USER, build_tokenizer

MEASURED_GAMES = 200
LONGEST_COMMAND = 4  # tokens, with the end token

# Axes: B games, L tokens, V words.


@dataclass(frozen=True)
class Recipe:
    """One stage of supervised learning.

    Attributes:
        games: Different games that it learns from.
        mistakes: Chance of a mistake at every turn of them.
        steps: Optimizer steps.
        once_lost: The chance from a game's first mistake on; None: the same.
        imitated: Whether mistakes are learnt, too; else only the expert's own turns are.
        batch: Games per step.
        lr: Highest learning rate; a cosine decays it to zero.
        seed: Seed of the data, and in a first stage of the initial weights.
    """

    games: int
    mistakes: float
    steps: int
    once_lost: float | None = None
    imitated: bool = False
    batch: int = 16
    lr: float = 2e-3
    seed: int = 0


WIDTH, LAYERS = 128, 4
TEACHER = (Recipe(games=4_000, mistakes=0.0, steps=800, seed=1), Recipe(games=20_000, mistakes=0.25, steps=4_000))
STUDENT = Recipe(games=4_000, mistakes=0.1, once_lost=0.6, imitated=True, steps=250, lr=1e-3, seed=1)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in fp32."""
    torch.manual_seed(seed)
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def encoded(turns: Sequence[Turn], word: dict[str, int], *, imitated: bool = False) -> tuple[list[int], list[bool]]:
    """A game as ids, and which of them are learnt: the commands, each with its end; mistakes only where imitated."""
    ids, learnt = list[int](), list[bool]()
    for turn in turns:
        seen, done = [USER, *turn.observation.split(), ASSISTANT], [*turn.command.split(), EOS]
        ids += [word[part] for part in (*seen, *done)]
        learnt += [False] * len(seen) + [turn.experts or imitated] * len(done)
    return ids, learnt


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> list[tuple[list[int], list[bool]]]:
    """The expert's games, as `encoded` makes them."""
    word = tokenizer.get_vocab()
    whole = (
        played(*game, rng, recipe.mistakes, once_lost=recipe.once_lost) for game in islice(games("train"), recipe.games)
    )
    return [encoded(turns, word, imitated=recipe.imitated) for turns in whole]


def batches(
    whole: list[tuple[list[int], list[bool]]], recipe: Recipe, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of ids and of what is learnt of them, [B, L] each, padded on the right."""
    print(f"  {len(whole):,} games of {sum(len(ids) for ids, _ in whole) / len(whole):.0f} tokens", flush=True)
    while True:
        rng.shuffle(whole)
        # Games of one batch are of about one length, so that little is padding; batches are in random order.
        part = 32 * recipe.batch
        parts = [sorted(whole[at : at + part], key=lambda own: len(own[0])) for at in range(0, len(whole), part)]
        places = [(own, at) for own in parts for at in range(0, len(own) - recipe.batch + 1, recipe.batch)]
        rng.shuffle(places)
        for own, at in places:
            chosen = own[at : at + recipe.batch]
            longest = max(len(ids) for ids, _ in chosen)
            ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])
            yield ids_BL, torch.tensor([own + [False] * (longest - len(own)) for _, own in chosen])


def train(model: LlamaForCausalLM, data: Iterator[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    """Supervised learning on `batches`: cross-entropy of what is learnt, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    start = time.monotonic()
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids_BL, learnt_BL = next(data)
        chosen_BL = learnt_BL[:, 1:]
        hidden_ND = model.model(input_ids=ids_BL[:, :-1]).last_hidden_state[chosen_BL]
        loss = F.cross_entropy(model.lm_head(hidden_ND), ids_BL[:, 1:][chosen_BL])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            spent = time.monotonic() - start
            print(f"  step {step} of {recipe.steps}, {spent:.0f} s, loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = MEASURED_GAMES) -> float:
    """Share of held-out games that a model wins at temperature 1; the same random numbers every time."""
    generator, word = torch.Generator().manual_seed(0), tokenizer.get_vocab()
    words = {token: text for text, token in word.items()}
    won, contexts, open_ = 0, list[list[int]](), list[Rooms]()
    for row in rows("held_out", count):
        open_.append(Rooms())
        seen = open_[-1].reset(row["prompt"], seed_of(row["id"]))
        contexts.append([word[part] for part in (USER, *seen.split(), ASSISTANT)])
    while open_:
        drawn = _commands(model, contexts, generator, word[EOS])
        going, kept = list[Rooms](), list[list[int]]()
        for game, context, ids in zip(open_, contexts, drawn, strict=True):
            seen, _, over, info = game.step(" ".join(words[token] for token in ids if token != word[EOS]))
            won += info["success"]
            if not over:
                going.append(game)
                kept.append([*context, *ids, *(word[part] for part in (USER, *seen.split(), ASSISTANT))])
        open_, contexts = going, kept
    return won / count


def _commands(
    model: LlamaForCausalLM, contexts: Sequence[list[int]], generator: torch.Generator, end: int
) -> list[list[int]]:
    """A turn behind each context, without a cache: contexts are short, and padded on the right."""
    drawn = [list[int]() for _ in contexts]
    for _ in range(LONGEST_COMMAND):
        whole = [[*context, *own] for context, own in zip(contexts, drawn, strict=True)]
        longest = max(map(len, whole))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole])
        last_B = torch.tensor([len(ids) - 1 for ids in whole])
        hidden_BD = model.model(input_ids=ids_BL).last_hidden_state[torch.arange(len(whole)), last_B]
        next_B = torch.multinomial(model.lm_head(hidden_BD).softmax(-1), 1, generator=generator)[:, 0].tolist()
        for own, token in zip(drawn, next_B, strict=True):
            if end not in own:
                own.append(token)
        if all(end in own for own in drawn):
            break
    return drawn


def described(recipe: Recipe) -> str:
    """What a stage learnt from, in a sentence of the model card."""
    how = "without mistakes"
    if recipe.mistakes:
        then = f", and in {recipe.once_lost:.0%} of those behind the first one" if recipe.once_lost is not None else ""
        how = f"with a mistake in {recipe.mistakes:.0%} of the turns{then}"
    whose = "all turns, mistakes included," if recipe.imitated else "the expert's own turns"
    games = f"{recipe.games:,} games that the expert plays {how}"
    how_long = f"{recipe.steps:,} steps of {recipe.batch} games, AdamW with a cosine from {recipe.lr:g}"
    return f"By supervised learning on {whose} in {games}: {how_long}, weight decay 0.05, seed {recipe.seed}."


def card(name: str, start: str, stages: Sequence[Recipe], share: float, parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    made = "\n".join(f"{number}. {described(stage)}" for number, stage in enumerate(stages, 1))
    return f"""---
license: apache-2.0
library_name: transformers
tags: [agent, on-policy-distillation]
---

# Rooms {name}

A Llama-style model of {parameters:,} parameters that plays Rooms, a small text game: it reads `at c2 . ways north .
west blue door . hold blue` and writes `open west blue`. It is the {name} of Retort's built-in environment, and good for
nothing else.

| of {MEASURED_GAMES} held-out games, temperature 1 | |
|---|---|
| won within 16 turns | {share:.1%} |

## How it was made

{LAYERS} layers of width {WIDTH}, from {start}:

{made}

No held-out layout occurs in the games. The weights are stored in bfloat16; the score is that of the stored weights,
loaded again into float32.

    python -m retort.tasks.rooms.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def learn(model: LlamaForCausalLM, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    """One stage; its weights end rounded to bfloat16, as they are stored."""
    rng = random.Random(recipe.seed)
    train(model, batches(demonstrations(tokenizer, recipe, rng), recipe, rng), recipe)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(weights.to(torch.bfloat16))


def save(name: str, start: str, stages: Sequence[Recipe], model: LlamaForCausalLM, out: Path) -> None:
    """Save and measure a model, and write its card."""
    tokenizer, folder = build_tokenizer(), out / name
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    share = measure(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    (folder / "README.md").write_text(card(name, start, stages, share, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: wins {share:.1%}, {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled teacher and student of Rooms.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=("teacher", "student"), help="only this one; a student needs the teacher")
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    if arguments.only != "student":
        model = build_model(tokenizer, TEACHER[0].seed)
        for recipe in TEACHER:
            learn(model, recipe, tokenizer)
        save("teacher", "random weights", TEACHER, model, arguments.out)
    if arguments.only != "teacher":
        model = LlamaForCausalLM.from_pretrained(arguments.out / "teacher", dtype=torch.float32)
        learn(model, STUDENT, tokenizer)
        save("student", "the teacher's weights", [STUDENT], model, arguments.out)


if __name__ == "__main__":
    main()
