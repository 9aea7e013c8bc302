"""Two teachers that each know one half of the problems: alone, side by side, routed, and in a debate.

    python benchmarks/debaters.py make runs/debaters     # two teachers, from the built-in one: minutes
    python benchmarks/debaters.py train runs/debaters    # one run for each row and seed; stops and resumes
    python benchmarks/debaters.py table runs/debaters    # Markdown

The problems are Countdown's, and the halves are small and large targets. Each teacher learns right responses to the
problems of its own half and wrong ones to the others. It also learns to debate: to end with how sure it is, 90 in its
own half and 30 in the other, to follow whoever is surest, and to continue a response with the transcript in sight. All
that is supervised, so a debate is as good here as models of this size can have it: the table says what the objectives
make of a debate that works, not whether large models debate well. Nothing is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import torch
import torch.nn.functional as F
from lab_page import spread
from runs import Job, run_all
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from retort.align.text import decode
from retort.errors import UserError
from retort.tasks import coached
from retort.tasks.coached.problems import wrong
from retort.tasks.coached.tokenizer import build_tokenizer
from retort.tasks.countdown.build import sample
from retort.tasks.countdown.problems import Problem, check, problems, solutions
from retort.tasks.countdown.problems import rows as task_rows
from retort.teachers.templates import fill

#: What the teachers read and write besides Countdown, and the templates that say it to them.
WORDS = ("[", "]", "Expert", "round", "expert", "discussion", "sure", "<<", "CONFIDENCE", ">>")
TEMPLATES = {
    **{"frame": "{sections} {prompt}", "closing": "", "expert": "expert {text} ;", "discussion": "discussion {text} ;"},
    "speech": "[{prompt}]\n{text}",
    **{"debate_first": "", "debate_again": "", "confidence": "sure ;"},
}
#: A problem belongs to the second teacher from this target on; about half of them do.
SECOND_FROM = 25
SURE, UNSURE = 90, 30
CONTEXT = 256
HELD_OUT, SAMPLES = 200, 8
TEACHERS = ("teacher", "teacher_2")
#: Their names where each prompt has its own.
ROUTED = ("first", "second")

TRAINING: dict[str, Any] = {
    **{"steps": 25, "precision": "fp32", "threads": 1, "task": "countdown", "templates": TEMPLATES},
    "rollout": {"prompts": 64, "max_new_tokens": 14, "max_prompt_tokens": 8, "parallel": 4096},
    "optimizer": {
        **{"learning_rate": 5e-4, "schedule": "cosine", "warmup": 5, "beta2": 0.98, "weight_decay": 0.0},
        **{"updates": 1, "batch_tokens": 16384, "grad_clip": 1.0},
    },
    "eval": {"problems": HELD_OUT, "samples": SAMPLES, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 14},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}
#: Of all methods: sampled from the model itself, and the divergence of the paper's agents.
_ALL: Mapping[str, Any] = {"samples": 4, "temperature": 1.0, "top_p": 1.0}
_ONE = {"name": "mt_opd", "teachers": 1, **_ALL}
_DEBATE = {"name": "mad_opd", "debate_tokens": 18, **_ALL}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "first teacher": {"method": _ONE},
    "second teacher": {"method": _ONE, "teacher": "teacher_2"},
    "mt_opd": {"method": {"name": "mt_opd", **_ALL}},
    "routed": {"method": _ONE, "teachers": {"models": list(ROUTED), "combine": "route"}},
    "mad_opd, no transcript": {"method": {**_DEBATE, "transcript": False}},
    "mad_opd, equal weights": {"method": {**_DEBATE, "weights": "equal"}},
    "mad_opd": {"method": _DEBATE},
    "opad": {"method": {**_DEBATE, "name": "opad"}},  # of one turn, so it is the same
}


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained: steps, rows of each layout in a step, the highest learning rate, a seed."""

    steps: int = 600
    rows: int = 24
    lr: float = 1e-3
    seed: int = 0


def half(target: int) -> int:
    """Which teacher knows the problem, 0 or 1."""
    return int(target >= SECOND_FROM)


def vocabulary() -> PreTrainedTokenizerFast:
    """The tokenizer of the built-in models with the words of a debate behind theirs."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(WORDS))
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def grown(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A built-in model with rows for the new words and room for a transcript."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = CONTEXT
    return model


class Games:
    """Training texts of one teacher."""

    def __init__(self, who: int, seed: int) -> None:
        self.who, self.rng = who, random.Random(f"debaters {who} {seed}")
        self.problems = problems("train", 3)

    def texts(self, layout: str) -> tuple[str, str]:
        """What the teacher reads, and what it then writes: plain, in a round of the debate, or to score a student."""
        drawn = self.rng.choice(self.problems)
        problem = Problem(tuple(self.rng.sample(drawn.numbers, 3)), drawn.target)
        knows = half(problem.target)
        right = solutions(problem)
        if layout == "plain":
            return problem.prompt, self.answer(problem, right, self.who == knows)
        first = [self.answer(problem, right, who == knows) for who in (0, 1)]
        last = [first[knows] if self.rng.random() < 0.85 else self.rng.choice(right) for _ in (0, 1)]
        said = [_speech(who, 1, self.sure(first[who], who == knows)) for who in (0, 1)]
        asks = f"expert {self.who + 1} ; sure ; {problem.prompt}"
        if layout == "first":
            return asks, self.sure(first[self.who], self.who == knows)
        if layout == "again":
            return f"discussion {' '.join(said)} ; {asks}", self.sure(last[self.who], self.who == knows)
        said += [_speech(who, 2, self.sure(last[who], who == knows)) for who in (0, 1)]
        followed = last[knows] if self.rng.random() < 0.85 else self.rng.choice(right)
        return f"expert {self.who + 1} ; discussion {' '.join(said)} ; {problem.prompt}", followed

    def answer(self, problem: Problem, right: Sequence[str], knows: bool) -> str:
        """A response of somebody who knows, or does not."""
        return self.rng.choice(right) if knows else wrong(problem, self.rng)

    def sure(self, text: str, knows: bool) -> str:
        """A response with how sure its author is."""
        return f"{text} <<CONFIDENCE={SURE if knows else UNSURE}>>"


def _speech(who: int, number: int, text: str) -> str:
    return fill(TEMPLATES["speech"], prompt=f"Expert {who + 1}, round {number}", text=text)


def batch(games: Games, tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[tuple[Tensor, int]]:
    """Token ids, [B, L], and how many at their end are learnt, in groups of one length each."""
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for layout in ("plain", "first", "again", "score"):
        for _ in range(rows):
            read, written = games.texts(layout)
            learnt = [*tokenizer(written).input_ids, tokenizer.eos_token_id]
            ids = tokenizer(read).input_ids + learnt
            groups.setdefault((len(ids), len(learnt)), []).append(ids)
    for (_, learnt), found in groups.items():
        yield torch.tensor(found), learnt


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, games: Games, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of what the teacher writes, AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.1)
    start = time.monotonic()
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = list(batch(games, tokenizer, recipe.rows))
        count = sum(len(tokens_BL) * learnt for tokens_BL, learnt in parts)
        optimizer.zero_grad()
        whole = 0.0
        for tokens_BL, learnt in parts:
            logits_BLV = model(input_ids=tokens_BL[:, :-1], logits_to_keep=learnt).logits
            targets = tokens_BL[:, -learnt:].flatten()
            loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets, reduction="sum") / count
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step} of {recipe.steps}, {time.monotonic() - start:.0f} s, loss {whole:.4f}", flush=True)


def make(folder: Path, recipe: Recipe) -> int:
    """Makes rows, the tokenizer, both teachers, and the student, which is the built-in one."""
    torch.set_num_threads(1)
    tokenizer, start = vocabulary(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("rows", "train", None), ("held-out", "held_out", HELD_OUT)):
        rows = [{**row, "domain": ROUTED[half(int(row["answer"]))]} for row in task_rows(split, count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _save(grown(coached.student_path(), tokenizer, recipe.seed), tokenizer, folder / "student")
    for who, name in enumerate(TEACHERS):
        model = grown(coached.teacher_path(), tokenizer, recipe.seed + who)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        train(model, tokenizer, Games(who, recipe.seed), recipe)
        _save(model, tokenizer, folder / name)
    print(f"{folder}: {time.monotonic() - start:.0f} s")
    return 0


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def jobs(folder: Path, only: Sequence[str], seeds: int, steps: int) -> list[Job]:
    """All runs, seed by seed."""
    found: list[Job] = []
    for seed in range(seeds):
        for name, own in METHODS.items():
            if only and name not in only:
                continue
            first = str(folder / own.get("teacher", "teacher"))
            judged = {**TRAINING["eval"], "data": str(folder / "held-out.jsonl"), "teacher": False}
            settings = {
                **{**TRAINING, **own, "steps": steps},
                **{"student": str(folder / "student"), "teacher": first, "data": str(folder / "rows.jsonl")},
                **{"models": {"teacher_2": {"path": str(folder / "teacher_2")}}, "eval": judged, "seed": seed},
            }
            if "teachers" in own:
                del settings["teacher"]
                settings["models"] = {
                    one: {"path": str(folder / other)} for one, other in zip(ROUTED, TEACHERS, strict=True)
                }
            elif own["method"].get("teachers") == 1:
                del settings["models"]
            place = folder / "runs" / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            found.append(Job("debaters", name, seed, place, settings))
    return found


def halves(path: Path) -> list[float]:
    """Share of right responses of a model to the problems of each half, and to all, in %; sampled alike for all."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    prompts = [row["prompt"] for row in task_rows("held_out", HELD_OUT)]
    encoded = torch.tensor(tokenizer(prompts).input_ids).repeat_interleave(SAMPLES, 0)
    drawn = sample(model, encoded, torch.Generator().manual_seed(0)).tolist()
    right: tuple[list[bool], list[bool]] = ([], [])
    for at, tokens in enumerate(drawn):
        prompt, end = prompts[at // SAMPLES], tokenizer.eos_token_id
        text = decode(tokenizer, tokens[: tokens.index(end) if end in tokens else 0])  # no end is wrong
        right[half(int(prompt.split()[0]))].append(check(prompt, text))
    return [100 * statistics.mean(part) for part in (*right, right[0] + right[1])]


def table(folder: Path, seeds: int, steps: int) -> str:
    """Right responses by half, with the spread over seeds; the models themselves first."""
    done = [job for job in jobs(folder, (), seeds, steps) if job.finished]
    anchors = (("student before", "student"), ("the first teacher itself", "teacher"))
    lines: list[list[Any]] = [
        [label, "–", *_cells([halves(folder / name)]), "–"]
        for label, name in (*anchors, ("the second teacher itself", "teacher_2"))
    ]
    for name in METHODS:
        own = [job for job in done if job.method == name]
        if own:
            spent = [sum(line["time/step"] for line in _lines(job.folder)) for job in own]
            cells = _cells([halves(job.folder / "model") for job in own])
            lines.append([name, len(own), *cells, f"{min(spent):.0f}"])
    return measure.markdown(["", "seeds", "first half, %", "second half, %", "all, %", "seconds"], lines)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _cells(found: Sequence[Sequence[float]]) -> list[str]:
    return [spread(list(column), 1) for column in zip(*found, strict=True)]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "train", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=(), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=TRAINING["steps"], help="batches of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    arguments = parser.parse_args()
    if arguments.command == "make":
        return make(arguments.folder, Recipe())
    if not (arguments.folder / TEACHERS[-1]).exists():
        raise UserError(f"{arguments.folder} has no models; call `make` first")
    if arguments.command == "train":
        return (
            1
            if run_all(jobs(arguments.folder, arguments.only, arguments.seeds, arguments.steps), arguments.jobs)
            else 0
        )
    print(table(arguments.folder, arguments.seeds, arguments.steps))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
