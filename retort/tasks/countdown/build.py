"""Make the bundled Countdown teacher and student from nothing.

    python -m retort.tasks.countdown.build --out models

saves ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers measured in
this very run. The teacher is trained on random right responses. The student is the teacher with layers cut out,
cold-started with a few steps of the same training: smaller, and with much left to learn from the teacher.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retort.align.text import decode
from retort.tasks.countdown.problems import Problem, check, problems, rows, solutions
from retort.tasks.countdown.tokenizer import build_tokenizer

NUMBERS = 3
MAX_NEW_TOKENS = 14  # a right response is 11 tokens and the end token
MEASURED_PROBLEMS = 321  # all that are held out
SAMPLES = 8
#: The task itself has some 3,000 training problems, which a model of a million parameters memorises. Four times as
#: many, with larger numbers and targets, teach it more about searching for a solution (see docs/log.md).
WIDE_NUMBER, WIDE_TARGET, TASK_SHARE = 20, 120, 0.4

# Axes: B sequences, L tokens of a sequence, V words, P problems, K samples of one problem.


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Sequences per step.
        lr: Highest learning rate; a cosine decays it to zero.
        weight_decay: Weight decay of AdamW.
        seed: Seed of initial weights and data.
        until: Mean loss of 25 steps at which to stop before the last step.
        bf16: Whether products are in bfloat16; several times slower than fp32 on a CPU without instructions for it.
    """

    steps: int
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    until: float = 0.0
    bf16: bool = True


SHAPE = {"hidden_size": 128, "num_hidden_layers": 5, "intermediate_size": 512}
TEACHER = Recipe(steps=4500)
STUDENT = Recipe(steps=75, lr=1e-3, seed=1)
KEPT_LAYERS = (0, 2, 4)


@dataclass(frozen=True)
class Score:
    """Accuracy on the held-out problems, temperature 1: the mean over samples, and at least one right of eight."""

    avg_at_8: float
    pass_at_8: float


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Mapping[str, int], seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in fp32."""
    torch.manual_seed(seed)
    heads, ids = 4, _ids(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=shape["hidden_size"] // heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **shape,
        **ids,
    )
    return _generating(LlamaForCausalLM(config), ids)


def cut_student(teacher: LlamaForCausalLM, kept: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The teacher with only some of its layers, in fp32."""
    config = LlamaConfig(**{**teacher.config.to_dict(), "num_hidden_layers": len(kept), "dtype": "float32"})
    student = LlamaForCausalLM(config)
    weights = {name: value for name, value in teacher.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(kept):
        layer = teacher.model.layers[old].state_dict()
        weights |= {f"model.layers.{new}.{name}": value for name, value in layer.items()}
    student.load_state_dict(weights)
    return _generating(student, _ids(tokenizer))


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches of token ids, [B, L]: random training problems, number orders and right responses."""
    rng = random.Random(recipe.seed)
    word = tokenizer.get_vocab()
    task = problems("train", NUMBERS)
    wide = problems("train", NUMBERS, largest_number=WIDE_NUMBER, largest_target=WIDE_TARGET)
    solved: dict[Problem, list[str]] = {}
    while True:
        texts: list[str] = []
        for _ in range(recipe.batch):
            problem = rng.choice(task if rng.random() < TASK_SHARE else wide)
            if problem not in solved:
                solved[problem] = solutions(problem)
            shown = Problem(tuple(rng.sample(problem.numbers, NUMBERS)), problem.target)
            texts.append(f"{shown.prompt} {rng.choice(solved[problem])} {tokenizer.eos_token}")
        yield torch.tensor([[word[part] for part in text.split()] for text in texts])  # all have the same length


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of the response tokens, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    prompt, start, data = NUMBERS + 3, time.monotonic(), batches(tokenizer, recipe)
    recent: deque[float] = deque(maxlen=25)
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens_BL = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits_BLV = model(input_ids=tokens_BL[:, :-1]).logits[:, prompt - 1 :]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        done = len(recent) == recent.maxlen and sum(recent) / len(recent) <= recipe.until
        if step % 300 == 0 or step == recipe.steps or done:
            score, spent = measure(model, tokenizer), time.monotonic() - start
            print(f"  step {step} of {recipe.steps}, {spent:.0f} s, loss {loss.item():.4f}, {score}", flush=True)
        if done:
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
    prompts = [row["prompt"] for row in rows("held_out", MEASURED_PROBLEMS, numbers=NUMBERS)]
    encoded = torch.tensor(tokenizer(prompts).input_ids).repeat_interleave(SAMPLES, 0)
    right: list[bool] = []
    for at, tokens in enumerate(sample(model, encoded, torch.Generator().manual_seed(0)).tolist()):
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else 0  # no end is wrong
        right.append(check(prompts[at // SAMPLES], decode(tokenizer, tokens[:end])))
    right_PK = torch.tensor(right).view(-1, SAMPLES)
    return Score(right_PK.float().mean().item(), right_PK.any(1).float().mean().item())


def card(name: str, how: str, score: Score, parameters: int) -> str:
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

{how} No held-out problem occurs in its training data in any order of its numbers. The weights are stored in bfloat16;
the scores are those of the stored weights, loaded again into float32.

    python -m retort.tasks.countdown.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def export(name: str, model: LlamaForCausalLM, how: str, out: Path) -> Score:
    """Save a model to ``out/name``, and measure the saved one."""
    tokenizer, folder = build_tokenizer(), out / name
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    score = measure(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    (folder / "README.md").write_text(card(name, how, score, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: avg@8 {score.avg_at_8:.1%}, pass@8 {score.pass_at_8:.1%}, {size:.1f} MB in {folder}", flush=True)
    return score


def make_teacher(out: Path) -> None:
    """Train and save the teacher."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, SHAPE, TEACHER.seed)
    print(f"teacher: {model.num_parameters():,} parameters", flush=True)
    train(model, tokenizer, TEACHER)
    how = (
        f"From random weights, by supervised learning on random right responses to training problems of the task and "
        f"to wider ones (numbers to {WIDE_NUMBER}, targets to {WIDE_TARGET}). {SHAPE['num_hidden_layers']} layers of "
        f"width {SHAPE['hidden_size']}, {_words(TEACHER)}."
    )
    export("teacher", model, how, out)


def make_student(out: Path) -> None:
    """Cut the saved teacher down, cold-start the rest, and save the student."""
    tokenizer = build_tokenizer()
    teacher = LlamaForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
    student = cut_student(teacher, KEPT_LAYERS, tokenizer)
    print(f"student: {student.num_parameters():,} parameters, cut: {measure(student, tokenizer)}", flush=True)
    train(student, tokenizer, STUDENT)
    how = (
        f"The teacher with only its layers {', '.join(map(str, KEPT_LAYERS))} (counted from 0) kept, then cold-started "
        f"by supervised learning on the teacher's kind of data: {_words(STUDENT)}."
    )
    export("student", student, how, out)


def _words(recipe: Recipe) -> str:
    return (
        f"{recipe.steps:,} steps of {recipe.batch} sequences, AdamW with a cosine from {recipe.lr:g}, "
        f"weight decay {recipe.weight_decay:g}, seed {recipe.seed}"
    )


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}


def _generating(model: LlamaForCausalLM, ids: dict[str, Any]) -> LlamaForCausalLM:
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled Countdown teacher and student.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=("teacher", "student"), help="make only this one")
    arguments = parser.parse_args()
    if arguments.only != "student":
        make_teacher(arguments.out)
    if arguments.only != "teacher":
        make_student(arguments.out)


if __name__ == "__main__":
    main()
