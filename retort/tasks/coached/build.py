"""Make the bundled student and teacher of coached Countdown from Countdown's teacher.

    python -m retort.tasks.coached.build --out models

saves ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers measured in
this very run. Both start from the weights of ``countdown:teacher``, with rows for the new words; the student keeps only
some of the layers. Both are then trained, by supervised learning, to respond with and without sections before the
question: to use a solution, to follow a plan, not to repeat a mistake, and to follow a suggestion half of the time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retort.align.text import decode
from retort.tasks import countdown
from retort.tasks.coached.problems import TEMPLATES, bait_rows, check, feedback, followed, mistake, outcome, plan, rows
from retort.tasks.coached.problems import wrong as wrong_response
from retort.tasks.coached.tokenizer import CONTEXT, build_tokenizer
from retort.tasks.countdown.build import TASK_SHARE, WIDE_NUMBER, WIDE_TARGET, cut_student, sample
from retort.tasks.countdown.problems import Problem, problems, solutions

NUMBERS = 3
RESPONSE = 12  # tokens of a right response, with the end token
MEASURED_PROBLEMS = 321  # all that are held out
SAMPLES = 8

#: Sections before the question, and how often they are drawn. A batch has four layouts, and plain questions.
LAYOUTS: Mapping[tuple[str, ...], float] = {
    ("solution",): 2.0,
    ("hint",): 2.0,
    ("outcome",): 2.0,
    ("right",): 1.0,
    ("right", "right"): 1.0,
    ("right", "right", "right"): 0.3,
    ("right", "wrong"): 0.5,
    ("right", "right", "wrong"): 0.7,
    ("right", "wrong", "feedback"): 0.7,
    ("right", "right", "wrong", "feedback"): 0.7,
    ("right", "right", "wrong", "wrong"): 0.3,
    ("wrong",): 0.5,
    ("feedback",): 0.5,
    ("wrong", "feedback"): 1.5,
    ("wrong", "wrong", "feedback"): 0.4,
    ("example",): 0.6,
    ("example", "example"): 0.5,
    ("example", "example", "example"): 0.5,
    ("example", "solution"): 0.3,
    ("maybe",): 2.0,
    ("solution", "maybe"): 0.4,
    ("hint", "maybe"): 0.3,
}
#: Layouts for the first part of the training: the shown text can be copied, and nothing stands in between. Everything
#: else builds on copying, which is learnt several times slower when mixed with the rest.
EASY = (("solution",), ("solution",), ("right",), ("hint",), ("maybe",))
EASY_PART = 0.35
#: How often a response repeats the solution that it is shown, and follows a suggestion.
REPEATED, FOLLOWED = 0.85, 0.5


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        kept: Layers of Countdown's teacher, counted from 0.
        steps: Optimizer steps.
        plain: Plain questions per step.
        shown: Questions per step and layout, of four layouts.
        lr: Highest learning rate; a cosine decays it to zero.
        seed: Seed of new weights and data.
    """

    kept: tuple[int, ...]
    steps: int
    plain: int = 32
    shown: int = 16
    lr: float = 2.5e-3
    seed: int = 0


TEACHER = Recipe(kept=(0, 1, 2, 3, 4), steps=500)
STUDENT = Recipe(kept=(0, 2, 4), steps=900, seed=1)

#: The measurements: name in the model card, and the columns that are shown.
SHOWN: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "example": ("example",),
    "wrong and feedback": ("wrong", "feedback"),
    "outcome": ("outcome",),
    "hint": ("hint",),
    "two right, one wrong": ("right", "right", "wrong"),
    "solution": ("solution",),
    "bait": ("maybe",),
}


@dataclass(frozen=True)
class Score:
    """Shares over held-out problems and samples at temperature 1: right ones, and ones that follow the suggestion."""

    right: float
    followed: float = 0.0


def context(
    layout: Sequence[str], problem: Problem, rng: random.Random, others: Sequence[Problem]
) -> tuple[str, str, str]:
    """The sections of a layout for one problem.

    Returns:
        The text before the question; a right response that agrees with it; and a suggestion, if there is one.
    """
    right = solutions(problem)
    chosen, sections, suggestion = rng.choice(right), list[str](), ""
    shown = list[str]()
    wrong = ""
    for kind in layout:
        if kind == "right":
            shown.append(rng.choice(right))
            sections.append(TEMPLATES["success"].format(text=shown[-1]))
        elif kind == "example":
            other = rng.choice(others)
            asked = Problem(tuple(rng.sample(other.numbers, NUMBERS)), other.target)
            sections.append(TEMPLATES["example"].format(prompt=asked.prompt, text=rng.choice(solutions(other))))
        elif kind == "wrong":
            made = rng.choices(("missed", "twice", "claimed"), (5, 2, 3))[0]
            wrong = mistake(problem, rng, made)
            sections.append(TEMPLATES["failure"].format(text=wrong))
        elif kind == "feedback":
            wrong = wrong or mistake(problem, rng, "missed")
            sections.append(TEMPLATES["feedback"].format(text=feedback(problem.prompt, wrong)))
        elif kind == "maybe":
            suggestion = wrong_response(problem, rng)
            sections.append(f"maybe {suggestion} ;")
        else:
            text = {"solution": str, "hint": plan, "outcome": outcome}[kind](chosen)
            sections.append(TEMPLATES[kind].format(text=text))
    if "solution" in layout or shown:
        repeated = chosen if "solution" in layout else rng.choice(shown)
        response = repeated if rng.random() < REPEATED else rng.choice(right)
    else:
        response = chosen
    return "".join(f"{section} " for section in sections), response, suggestion


class Data:
    """Batches of training problems: the task's own, and wider ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"coached build {seed}")
        self.word = build_tokenizer().get_vocab()
        self.task = problems("train", NUMBERS)
        self.wide = problems("train", NUMBERS, largest_number=WIDE_NUMBER, largest_target=WIDE_TARGET)

    def texts(self, layout: Sequence[str], count: int) -> list[str]:
        """Questions behind their sections, and responses."""
        found: list[str] = []
        for _ in range(count):
            problem = self.rng.choice(self.task if self.rng.random() < TASK_SHARE else self.wide)
            asked = Problem(tuple(self.rng.sample(problem.numbers, NUMBERS)), problem.target)
            before, response, suggestion = context(layout, asked, self.rng, self.task)
            if suggestion and self.rng.random() < FOLLOWED:
                response = suggestion
            found.append(f"{before}{asked.prompt} {response} <eos>")
        return found

    def batch(self, recipe: Recipe, easy: bool) -> list[Tensor]:
        """Token ids, [B, L], in groups of one length each."""
        layouts = self.rng.choices(EASY if easy else list(LAYOUTS), None if easy else list(LAYOUTS.values()), k=4)
        texts = self.texts((), recipe.plain)
        for layout in layouts:
            texts += self.texts(layout, recipe.shown)
        groups: dict[int, list[list[int]]] = {}
        for text in texts:
            ids = [self.word[part] for part in text.split()]
            groups.setdefault(len(ids), []).append(ids)
        return [torch.tensor(rows) for rows in groups.values()]


def extended(source: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Countdown's teacher with the layers to keep, rows for the new words, and room for sections."""
    torch.manual_seed(recipe.seed)
    cut = cut_student(source, recipe.kept, tokenizer)
    table = "model.embed_tokens.weight"
    old = cut.state_dict()[table]
    config = LlamaConfig(**{**cut.config.to_dict(), "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT})
    model = LlamaForCausalLM(config)
    fresh = torch.randn(len(tokenizer) - len(old), old.shape[1]) * old.std()
    weights = {**cut.state_dict(), table: torch.cat([old, fresh])}
    model.load_state_dict({**weights, "lm_head.weight": weights[table]})
    model.generation_config = cut.generation_config
    return model


def train(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of the response tokens, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.1)
    data, start = Data(recipe.seed), time.monotonic()
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        groups = data.batch(recipe, step <= EASY_PART * recipe.steps)
        count = sum(len(tokens_BL) for tokens_BL in groups) * RESPONSE
        whole = 0.0
        optimizer.zero_grad()
        for tokens_BL in groups:
            logits_BLV = model(input_ids=tokens_BL[:, :-1], logits_to_keep=RESPONSE).logits
            targets = tokens_BL[:, -RESPONSE:].flatten()
            loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets, reduction="sum") / count
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == recipe.steps:
            spent = time.monotonic() - start
            print(f"  step {step} of {recipe.steps}, {spent:.0f} s, loss {whole:.4f}", flush=True)
            scores = measure(model, 80, 2)
            few = ", ".join(f"{kind} {score.right:.0%}" for kind, score in scores.items())
            print(f"    {few}, followed {scores['bait'].followed:.0%}", flush=True)


def measured(kind: str, count: int) -> list[str]:
    """Held-out prompts behind the sections of a kind of `SHOWN`; the same every time."""
    given, others = rows("held_out", count), problems("train", NUMBERS)
    if kind == "bait":
        return [row["prompt"] for row in bait_rows("held_out", count)]
    found: list[str] = []
    for row in given:
        target, _, *numbers, _ = row["prompt"].split()
        problem = Problem(tuple(map(int, numbers)), int(target))
        before, *_ = context(SHOWN[kind], problem, random.Random(f"measured {kind} {row['id']}"), others)
        found.append(before + row["prompt"])
    return found


def measure(
    model: LlamaForCausalLM, count: int = MEASURED_PROBLEMS, samples: int = SAMPLES, kinds: Sequence[str] = tuple(SHOWN)
) -> dict[str, Score]:
    """The scores of ``model`` on the same held-out problems and with the same seed every time."""
    return {kind: _score(model, measured(kind, count), samples) for kind in kinds}


def _score(model: LlamaForCausalLM, prompts: Sequence[str], samples: int) -> Score:
    tokenizer, lengths = build_tokenizer(), dict[int, list[str]]()
    for prompt in prompts:
        lengths.setdefault(len(prompt.split()), []).append(prompt)
    right = follows = 0
    for length, alike in sorted(lengths.items()):
        encoded = torch.tensor(tokenizer(alike).input_ids).repeat_interleave(samples, 0)
        drawn = sample(model, encoded, torch.Generator().manual_seed(length)).tolist()
        for at, tokens in enumerate(drawn):
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else 0  # no end is wrong
            prompt, text = alike[at // samples], decode(tokenizer, tokens[:end])
            right += check(prompt, text)
            follows += followed(prompt, text)
    whole = len(prompts) * samples
    return Score(right / whole, follows / whole)


def card(name: str, how: str, scores: Mapping[str, Score], parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    table = "\n".join(f"| {kind} | {score.right:.1%} |" for kind, score in scores.items())
    return f"""---
license: apache-2.0
library_name: transformers
tags: [countdown, self-distillation, on-policy-distillation]
---

# Coached Countdown {name}

A Llama-style model of {parameters:,} parameters that plays Countdown: it reads `45 from 3 5 12 :`, perhaps behind
sections such as `solution 12 - 3 = 9 , 9 * 5 = 45 ;`, and writes `12 - 3 = 9 , 9 * 5 = 45`. It is the {name} of
Retort's built-in task of self-distillation, and good for nothing else.

| shown, on {MEASURED_PROBLEMS} held-out problems, {SAMPLES} samples each, temperature 1 | right |
|---|---|
{table}
| bait: response is the suggestion, token for token | {scores["bait"].followed:.1%} |

## How it was made

{how} No held-out problem occurs in its training data in any order of its numbers. The weights are stored in bfloat16;
the scores are those of the stored weights, loaded again into float32.

    python -m retort.tasks.coached.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def make(name: str, recipe: Recipe, out: Path) -> None:
    """Train a model, save it to ``out/name``, and measure the saved one."""
    tokenizer, folder = build_tokenizer(), out / name
    source = LlamaForCausalLM.from_pretrained(countdown.teacher_path(), dtype=torch.float32)
    model = extended(source, tokenizer, recipe)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    train(model, recipe)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    scores = measure(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    how = (
        f"From the weights of `countdown:teacher`, its layers {', '.join(map(str, recipe.kept))} (counted from 0), by "
        f"supervised learning on right responses behind all kinds of sections, and on suggestions that are followed "
        f"half of the time: {recipe.steps:,} steps of {recipe.plain} plain questions and {4 * recipe.shown} with "
        f"sections (for the first {EASY_PART:.0%} of the steps only such as can be copied), AdamW with a cosine from "
        f"{recipe.lr:g}, seed {recipe.seed}."
    )
    (folder / "README.md").write_text(card(name, how, scores, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    for kind, score in scores.items():
        print(f"  {kind}: {score.right:.1%} right, {score.followed:.1%} follow the suggestion")
    print(f"{name}: {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled student and teacher of coached Countdown.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=("teacher", "student"), help="make only this one")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of as many as it needs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, recipe in (("teacher", TEACHER), ("student", STUDENT)):
        if arguments.only in (None, name):
            make(name, recipe if arguments.steps is None else replace(recipe, steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
