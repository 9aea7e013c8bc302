"""What `torchrun` starts in the tests: some runs, of which each writes down what its steps came to.

    torchrun --nproc-per-node 2 tests/ranks/worker.py FOLDER JOB...

A job is the name of a case; `NAME+1` stops after step 1, and `NAME+` or `NAME+2` goes on with a run that was stopped;
`caching` makes the runs of `caching.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from image_models import make_image_model
from pipeline import models_once
from players import TEMPLATES, make_player, often_ending
from trained import make_model_of

from retort import Stop, api, ranks
from retort import config as configuration
from retort.core.rollouts import Prompt
from retort.models.images import made_up
from retort.models.sharding import full
from retort.train import runner
from retort.train.models.models import located

#: Two updates of a batch, each of several packs. What moves from step to step is seen in the second and the third.
SMALL: dict[str, Any] = {
    "steps": 3,
    "seed": 3,
    "limit": 40,
    "precision": "fp32",
    "device": "cpu",
    "checks": "skip",
    "rollout": {"prompts": 4, "max_new_tokens": 14},
    "optimizer": {"learning_rate": 1e-3, "warmup": 0, "updates": 2, "batch_tokens": 64},
    "eval": {"problems": 0},
    "record": {"rollouts": 1},
    "checkpoint": {"every": 0},
    "ranks": {"head": "gathered"},
}
#: Each rank keeps slices of the teacher's layers.
SHARDED: dict[str, Any] = {"ranks": {"teacher": "sharded", "head": "gathered"}}
#: Steps so large that whoever writes with the weights of an earlier step is found out.
BF16: dict[str, Any] = {"precision": "bf16", "steps": 2, "optimizer": {"learning_rate": 1e-2}}
#: For what depends on how many steps there are: replay, controllers and curricula.
LONGER: dict[str, Any] = {"steps": 5}
#: Rollouts of a group, half as many as the papers take: groups that ranks divide, and that hold right and wrong ones.
FOUR: dict[str, Any] = {"samples": 4}
#: Stands for a student whose head has weights of its own, which the worker makes.
UNTIED = "untied"
#: Stands for a student of another tokenizer than the teacher's, both of which the worker makes, with rows for them.
SPELLING = "spelling"
#: Stands for two models that read images, and data with images, which the worker makes.
SEEING = "seeing"
#: Stands for the address of a server with the built-in teacher, a process of its own.
SERVED = "served"
#: Stands for the address of a judge by rules, a process of its own.
JUDGED = "judged"
#: The variables of the environment that hold these addresses.
ADDRESSES = {SERVED: "RANKS_SERVED", JUDGED: "RANKS_JUDGED"}
#: Stands for two models that take turns with an environment.
PLAYING = "playing"
WALK: dict[str, Any] = {"student": PLAYING, "limit": None, "rollout": {"env": "players:Walk", "max_new_tokens": 30}}
ASKING = {"student": "countdown:student", "teacher": SERVED, "data": "countdown"}
SLICED = {"head": "vocabulary"}
UNWEIGHTED = {"name": "exopd", "truncation": None}
#: Teachers of one student.
TWO: dict[str, Any] = {
    "method": {"name": "opd"},
    "models": {"a": {"path": "countdown:teacher"}, "b": {"path": "countdown:student"}},
}
#: One for each estimator, statistic, controller and kind of self-teacher.
CASES: dict[str, dict[str, Any]] = {
    "opd": {"method": {"name": "opd"}, "record": {"gradient_variance_every": 2}},
    "judged": {"method": {"name": "eopd"}, "eval": {"problems": 5, "samples": 2, "every": 2}},
    "gkd": {"method": {"name": "gkd"}},  # a mixture of rollouts and the data's responses
    "vopd": {"method": {"name": "vopd"}, "cold_start": {"steps": 2}},  # the teacher writes first
    "exopd": {"method": {"name": "exopd"}},  # a base model
    "arkd": {"method": {"name": "arkd"}, **LONGER},  # a controller that learns
    # Replay; it needs all ids at once, so nobody takes the slices that the rule would choose.
    "skew_kl": {"method": {"name": "skew_kl"}, "ranks": {"head": "auto"}, **LONGER},
    "dasd": {"method": {"name": "dasd", **FOUR}},  # statistics of the whole batch
    "sdpo": {"data": "coached", "method": {"name": "sdpo", **FOUR}},  # its own teacher, which moves, and rewards
    "unisd": {"data": "coached", "method": {"name": "unisd"}},
    # Episodes: weights by turn and rewards of groups; a horizon of turns that grows, behind an expert's.
    "sod": {**WALK, "method": {"name": "sod", "samples": 2}},
    "atod": {**WALK, "method": {"name": "atod", "samples": 2}},
    "tcod": {**WALK, "method": {"name": "tcod", "curriculum": "backward", "reduction": "turns"}, **LONGER},
    "lora": {"method": {"name": "exopd"}, "lora": {"rank": 4}},  # whose base model is the student without it
    # A teacher and a base; the teacher is evaluated, and the student computes its layers again.
    "exopd, sharded": {
        "method": {"name": "exopd"},
        **SHARDED,
        "eval": {"problems": 5, "samples": 2, "every": 2},
        "optimizer": {"gradient_checkpointing": True},
    },
    "vopd, sharded": {"method": {"name": "vopd"}, "cold_start": {"steps": 2}, **SHARDED},
    # Weights by what a token owes to the image, over all rollouts of a prompt; the vision tower learns.
    "va_opd": {"student": SEEING, "method": {"name": "va_opd", **FOUR}},
    "va_opd, sharded": {"student": SEEING, "method": {"name": "va_opd", **FOUR}, **SHARDED},
    # A teacher with another tokenizer: each of its distributions at a unit, at all tokens, and between replies.
    "gold": {"student": SPELLING, "method": {"name": "gold", "on_policy_fraction": 1.0}, "limit": None},
    "bpm": {"student": SPELLING, "method": {"name": "bpm"}, "limit": None},
    "spans_opd": {
        "student": SPELLING,
        "method": {"name": "opd"},
        "limit": None,
        "rollout": {"env": "players:Walk", "max_new_tokens": 40},
    },
    # Several teachers: of a batch's prompts a rank may have none for one whose layers it shares; who is best is found
    # on the rank of a group; a product of slices of the vocabulary.
    "routed, sharded": {**TWO, "teachers": {"models": ["a", "b"], "by": "worker:by_length"}, **SHARDED},
    "best": {**TWO, "method": {"name": "opd", "samples": 3}, "teachers": {"models": ["a", "b"], "combine": "best"}},
    "product_sliced": {**TWO, "teachers": {"models": ["a", "b"], "combine": "product"}, "ranks": SLICED},
    # Every rank asks a server about its own rollouts: for numbers, and for hidden states.
    "served": {**ASKING, "method": {"name": "eopd"}, "server": {"check_every": 2}},
    "served_whole": {**ASKING, "method": {"name": "gkd"}},
    # Every rank asks a judge about its own groups. The prompts come to other ranks in the third step, and what the
    # judge answered before is known there.
    "ropd": {
        "data": "countdown",
        "limit": 8,
        "judge": {"model": JUDGED},
        "method": {"name": "ropd", **FOUR, "references": 2},
    },
    # Two teachers, one of them the student as it was, write before they score; their layers are sliced.
    "mad_opd": {
        **SHARDED,
        "data": "coached",
        "models": {"teacher_2": {"path": "coached:student"}},
        "method": {"name": "mad_opd", "samples": 2, "debate": {"tokens": 12}},
    },
    # Two processes write with a copy of the student each, whose slices are gathered for that.
    "workers": {"method": {"name": "exopd"}, "lora": {"rank": 4}, "rollout": {"workers": 2}},
    # The same a step ahead, in threads that gather beside those that learn.
    "ahead": {"method": {"name": "opd"}, "rollout": {"workers": 2, "staleness": 1}, **LONGER},
    # The same in fp32, and with the ranks' own loop; no token is weighed by its log-prob, which both round differently.
    "written by workers": {"method": UNWEIGHTED, "lora": {"rank": 4}, "rollout": {"workers": 2}},
    "written by ranks": {"method": UNWEIGHTED, "lora": {"rank": 4}},
    # Completions that go on in the next batch are known to all ranks, and each continues its part of them.
    "resumed": {
        "student": PLAYING,
        "limit": None,
        "method": {"name": "opd", "samples": 2},
        "rollout": {"partial": "resume", "segment_tokens": 4},
        **LONGER,
    },
    # Each rank its slice of the vocabulary.
    "sliced": {"method": {"name": "opd"}, "ranks": SLICED, "record": {"gradient_variance_every": 2}},
    "sliced_jsd": {"method": {"name": "gkd"}, "ranks": SLICED},
    "sliced_untied": {"student": UNTIED, "method": {"name": "sdpo", **FOUR}, "data": "coached", "ranks": SLICED},
    "sliced_lora": {
        "student": UNTIED,
        "teacher": "countdown:teacher",
        "data": "countdown",
        "method": {"name": "topk_kl"},
        "lora": {"rank": 4, "targets": ["q_proj", "lm_head"]},
        "ranks": SLICED,
    },
    "plain": {"method": {"name": "eopd"}, "checkpoint": {"every": 1, "keep": 9}, "steps": 6},
    "plain_ahead": {
        "method": {"name": "eopd"},
        "checkpoint": {"every": 1, "keep": 9},
        "steps": 6,
        "rollout": {"workers": 1, "staleness": 1},
    },
    "plain_bf16": {"method": {"name": "opd"}, **BF16},
    "plain_bf16_lora": {"method": {"name": "exopd"}, "lora": {"rank": 4}, **BF16},
}

#: The job that is no case: the runs of `caching.py`, in a folder of this name.
CACHING = "caching"

#: Runs of the same ranks, which differ in who wrote.
WRITTEN = ("written by workers", "written by ranks")
#: In fp32, where rounding stays far below the tolerance; the others in float64, where there is next to none. In
#: adapters it does not: their weights begin at zero, Adam's first step divides a gradient by its own size, and where
#: that is 1e-4 of the others' its rounding is seen.
FP32 = ("opd", "gkd", "arkd", "sdpo", "served", "served_whole", *WRITTEN)


class Watching:
    """Writes down what a step came to, and stops where it is told to."""

    def __init__(self, stop: int | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.stop = stop

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> Stop | None:
        weights = [full(x.detach()).double() for x in run.student.trainable().values()]
        row = {name: metrics[name] for name in metrics if not name.startswith(("time/", "idle/", "tokens_per"))}
        norm = math.sqrt(sum(float(x.square().sum()) for x in weights))
        self.rows.append({**row, "weights_sum": float(sum(x.sum() for x in weights)), "weights_norm": norm})
        return Stop("enough") if run.step == self.stop else None


def addressed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the address of a server, where they name one; the tests start it, and say in `ADDRESSES`."""
    if settings.get("judge", {}).get("model") == JUDGED:
        return settings | {"judge": {"model": os.environ[ADDRESSES[JUDGED]]}}
    return settings | ({"teacher": os.environ[ADDRESSES[SERVED]]} if settings.get("teacher") == SERVED else {})


def job(words: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each step of a run."""
    name, plus, stop = words.partition("+")
    watching = Watching(int(stop) if stop else None)
    out = folder / (f"{name}+" if plus else name)
    if (out / "config.json").exists():
        run = runner.resume(out)
    else:
        settings = configuration.merge(SMALL, CASES[name])
        if settings.get("student") == UNTIED:
            settings["student"] = str(ranks.join().first(lambda: untied(folder / UNTIED, settings.get("data"))))
        for made, make in ((SPELLING, spelling), (PLAYING, playing), (SEEING, seeing)):
            if settings.get("student") == made:
                ranks.join().first(lambda make=make, made=made: make(folder / made))
                settings |= {role: str(folder / made / role) for role in ("student", "teacher")}
                settings["data"] = str(folder / made / "data.jsonl")
        run = runner.start(api.assemble(addressed(settings)), out)
    return watched(run, watching)


def watched(run: runner.Run, watching: Watching) -> list[dict[str, Any]]:
    run.callbacks = (watching,)
    run.go()
    return watching.rows


def by_length(prompt: Prompt) -> str:
    """The teacher of a prompt: nearly always the same one."""
    return "a" if len(prompt.text) % 5 else "b"


def spelling(folder: Path) -> None:
    """Two models with two tokenizers, and rows for them; made once."""
    if (folder / "data.jsonl").exists():
        return
    often_ending(make_model_of(folder / "student", "gemma", seed=1, scale=0.1), TEMPLATES[0], by=8.0)
    often_ending(make_model_of(folder / "teacher", "byte-level", seed=2, width=24), TEMPLATES[1], by=1.0)
    write_rows(folder, ["the quick brown fox", "hello", "a b c", "def f(x):"] * 5)


def playing(folder: Path) -> None:
    """Two models that speak the words of Rooms, and rows for them; made once."""
    if (folder / "data.jsonl").exists():
        return
    make_player(folder / "student", seed=1)
    make_player(folder / "teacher", seed=2, hidden_size=24)
    write_rows(folder, [f"three {number}" for number in range(20)])


def seeing(folder: Path) -> None:
    """Two models that read images, and images with questions; made once."""
    if (folder / "data.jsonl").exists():
        return
    for seed, role in enumerate(("student", "teacher"), start=1):
        make_image_model(folder / role, "llava", seed=seed, biases=0.1)
    rows: list[dict[str, Any]] = []
    for number in range(20):
        made_up(width=20 + number, seed=number).decoded().save(folder / f"{number}.png")
        rows.append({"prompt": f"What is {number}?", "images": [f"{number}.png"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path, prompts: list[str]) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def untied(folder: Path, data: str | None) -> Path:
    """The built-in student of some data with a head of its own, for which it has other numbers than for reading."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = located(f"{data or 'countdown'}:student"), folder / (data or "countdown")
    model = AutoModelForCausalLM.from_pretrained(path)
    embedding = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = False
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(embedding.detach() + 0.01 * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def main(folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    world = ranks.join()
    for words in jobs:
        if words == CACHING:
            importlib.import_module(CACHING).main(folder / CACHING)
            continue
        name = words.partition("+")[0]
        dtype = None if name in FP32 else torch.float64
        with contextlib.nullcontext() if name.startswith("plain") else models_once(dtype):  # plain: as a user has it
            rows = job(words, folder)
        (folder / f"{words}.{world.size}-{world.rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
