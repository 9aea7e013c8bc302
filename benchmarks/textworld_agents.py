"""Methods for episodes of many turns on generated games of TextWorld, with models cloned from its expert.

    pip install 'retort-distill[textworld]'
    python benchmarks/textworld_agents.py make runs/textworld     # compiles games, clones a student and a teacher
    python benchmarks/textworld_agents.py train runs/textworld    # one run for each method; stops and resumes
    python benchmarks/textworld_agents.py table runs/textworld    # Markdown

The expert is TextWorld's own plan. The teacher learns from its games, and then from games in which it is made to err at
times, so that it knows the way back. The student goes on from there with games of somebody careless, mistakes
included, as in the built-in environment. No game that is held out is among them. The models are not shipped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from runs import Job, run_all
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from retort.envs.textworld import TextWorld
from retort.errors import UserError
from retort.tasks.rooms.build import Recipe, batches, build_model, train
from retort.tasks.rooms.tokenizer import ASSISTANT, EOS, UNKNOWN, USER, build_tokenizer

#: A chain of rooms with a coin at its end: the shortest way has as many moves as the level says.
KIND = "coin_collector-4"
GAMES, HELD_OUT, FIRST_HELD_OUT = 60, 30, 1_000_000
#: Times that each game is played for the clones; mistakes differ.
PLAYED = 4
TEACHER = (
    Recipe(games=GAMES, mistakes=0.0, steps=100, batch=4),
    Recipe(games=GAMES, mistakes=0.25, steps=300, batch=4),
)
STUDENT = Recipe(games=GAMES, mistakes=0.3, once_lost=0.8, imitated=True, steps=120, batch=4, lr=1e-3, seed=1)
CONTEXT = 2048
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"name": "opd", "samples": 4},
    "tcod": {"name": "tcod", "samples": 4, "every": 1},
    "sod": {"name": "sod", "samples": 4},
}
TRAINING: dict[str, Any] = {
    **{"steps": 20, "precision": "fp32", "threads": 1, "seed": 0},
    "rollout": {"prompts": 6, "max_new_tokens": 96, "max_prompt_tokens": 512, "env": "textworld"},
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup": 3, "batch_tokens": 8192, "updates": 1},
    "eval": {"problems": HELD_OUT, "samples": 2, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 96},
    "checkpoint": {"every": 0},
    "record": {"rollouts": 1},
}

Turn = tuple[str, str, bool]  # what was seen, what was done, and whether the expert did it


def play(task: str, rng: random.Random, mistakes: float, once_lost: float | None = None) -> list[Turn]:
    """A game by the expert, who is made to err at times, more often behind a first mistake if `once_lost` says so."""
    game, turns, over = TextWorld(), list[Turn](), False
    seen = game.reset(task, 0)
    try:
        while not over and len(turns) < game.max_turns:
            way = game.expert()
            if not way:
                break
            wrong = [f"go {side}" for side in ("north", "east", "south", "west") if f"go {side}" != way[0]]
            erring = rng.random() < mistakes
            if erring and once_lost is not None:
                mistakes = once_lost
            command = rng.choice(wrong) if erring else way[0]
            turns.append((seen, command, not erring))
            seen, _, over, _ = game.step(command)
    finally:
        game.close()
    return turns


def words(tokenizer: Any, text: str) -> list[str]:
    """The words and signs of a text, as the tokenizer splits it."""
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def encoded(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], *, imitated: bool
) -> tuple[list[int], list[bool]]:
    """A game as ids, and which of them are learnt: the commands, each with its end; mistakes only where imitated."""
    vocab, ids, learnt = tokenizer.get_vocab(), list[int](), list[bool]()
    for seen, command, experts in turns:
        read, done = [USER, *words(tokenizer, seen), ASSISTANT], [*words(tokenizer, command), EOS]
        ids += [vocab.get(word, vocab[UNKNOWN]) for word in (*read, *done)]
        learnt += [False] * len(read) + [experts or imitated] * len(done)
    return ids[:CONTEXT], learnt[:CONTEXT]


def make(folder: Path) -> int:
    """Makes rows, tokenizer and both models."""
    start, rng = time.monotonic(), random.Random(0)
    tasks = [f"{KIND} {number}" for number in range(GAMES)]
    clean, every, careless = list[list[Turn]](), list[list[Turn]](), list[list[Turn]]()
    for done, task in enumerate(tasks, 1):
        clean.append(play(task, rng, TEACHER[0].mistakes))
        every += [clean[-1], *(play(task, rng, TEACHER[1].mistakes) for _ in range(1, PLAYED))]
        careless += [play(task, rng, STUDENT.mistakes, STUDENT.once_lost) for _ in range(PLAYED)]
        if done % 10 == 0:
            print(f"{done} of {len(tasks)} games, {time.monotonic() - start:.0f} s", flush=True)
    plain = build_tokenizer([])
    known = sorted(
        {
            word
            for turns in (*every, *careless)
            for seen, command, _ in turns
            for word in words(plain, f"{seen} {command}")
        }
    )
    tokenizer = build_tokenizer(known, CONTEXT)
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("rows", 0, GAMES), ("held-out", FIRST_HELD_OUT, HELD_OUT)):
        rows = [{"id": f"{KIND}-{n}", "prompt": f"{KIND} {n}"} for n in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.set_num_threads(1)
    model = build_model(tokenizer, TEACHER[0].seed)
    stages = (("teacher", TEACHER[0], clean), ("teacher", TEACHER[1], every), ("student", STUDENT, careless))
    for name, recipe, chosen in stages:
        shown = [encoded(tokenizer, turns, imitated=recipe.imitated) for turns in chosen]
        train(model, batches(shown, recipe, random.Random(recipe.seed)), recipe)
        _save(model, tokenizer, folder / name)
    print(f"{folder}: models of {model.num_parameters():,} parameters in {time.monotonic() - start:.0f} s")
    return 0


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def jobs(folder: Path, only: Sequence[str]) -> list[Job]:
    """The runs."""
    models = {name: str(folder / name) for name in ("student", "teacher")}
    data = {"data": str(folder / "rows.jsonl")}
    judged = {**TRAINING["eval"], "data": str(folder / "held-out.jsonl"), "teacher": True}
    return [
        Job("textworld", name, 0, folder / "runs" / name, {**TRAINING, **models, **data, "eval": judged, "method": own})
        for name, own in METHODS.items()
        if not only or name in only
    ]


def table(folder: Path) -> str:
    """Success, turns and the divergence by turn, before and after."""
    lines: list[list[Any]] = []
    for job in (own for own in jobs(folder, ()) if own.finished):
        anchors = not lines
        found = json.loads((job.folder / "eval.json").read_text())
        rows = {row["who"]: row for row in found["rows"]}
        seconds = sum(json.loads(line)["time/step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines())
        for who, row in rows.items():
            if who != "student after" and not anchors:
                continue
            by_turn = found["profile"].get(who, {}).get("by_turn", {}).get("reverse_kl", [])
            shown = ", ".join("–" if value is None else f"{value:.2f}" for value in by_turn[:8])
            interval = f"{row['success']['value']:.0%} [{row['success']['low']:.0%}, {row['success']['high']:.0%}]"
            errors = f"{row['tool_errors']['value']:.1f}"
            after = who == "student after"
            turns, spent = f"{row['turns']['value']:.1f}", f"{seconds:.0f}" if after else "–"
            lines.append([f"`{job.method}`" if after else who, interval, turns, errors, shown, spent])
    header = ["", "success", "turns", "wrong commands", "reverse KL in turns 1 to 8, nats per token", "seconds"]
    return measure.markdown(header, lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "train", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=(), metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    arguments = parser.parse_args()
    if arguments.command == "make":
        return make(arguments.folder)
    if not (arguments.folder / "teacher").exists():
        raise UserError(f"{arguments.folder} has no models; call `make` first")
    if arguments.command == "train":
        failed = run_all(jobs(arguments.folder, arguments.only), arguments.jobs)
        return 1 if failed else 0
    print(table(arguments.folder))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
