"""Tokens per second of a whole training step: Retort beside TRL's `DistillationTrainer`.

    python benchmarks/end_to_end.py --json end_to_end.json       # all pairs: some minutes, an otherwise idle machine
    python benchmarks/end_to_end.py --pairs small                # only the built-in tiny pair
    python benchmarks/end_to_end.py --pairs growth               # Retort alone: linear in time, flat in memory?
    python benchmarks/end_to_end.py --quick

Pairs: `small`, the built-in models on Countdown prompts, 64 prompts x 4 answers of at most 14 tokens; `large`, random
weights in Qwen3's shape with its vocabulary of 151,936, 16 answers of 128 tokens to prompts of 32. Both write with the
student, exact reverse KL, same dtype, attention (sdpa) and threads. TRL is run `tuned` (the whole step in one batch, no
gradient checkpointing, its own chunked loss), and for the small pair as its defaults have it, too. Every run has a
process of its own; runs alternate, and the first step of each warms up and is not counted.

To install TRL: `pip install .[benchmarks]`, after a build of torch for your machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import large_vocabulary
import measure
import torch
from training_systems import SYSTEMS, Work

#: Prompts per step of `growth`: about 2,000, 8,000, 33,000 and 66,000 written tokens, at 4 answers of 12 tokens each.
GROWTH = (43, 171, 683, 1366)


def small(steps: int, per_step: int = 64, *, bf16: bool = False) -> Work:
    """The built-in pair."""
    from retort.tasks import countdown

    texts = [str(row["prompt"]) for row in countdown.rows("train", per_step * steps)]
    folders = str(countdown.student_path()), str(countdown.teacher_path())
    return Work(*folders, tuple(texts), per_step, 4, new_tokens=14, prompt_tokens=8, steps=steps, bf16=bf16)


def large(folder: Path, steps: int, *, bf16: bool = False, quick: bool = False) -> Work:
    """The pair with a large vocabulary; made on first use."""
    vocab = 4096 if quick else large_vocabulary.VOCAB
    if not (folder / "teacher" / "config.json").exists():
        shapes = {"student": (128, 2), "teacher": (192, 2)} if quick else None
        large_vocabulary.build_pair(folder, vocab=vocab, shapes=shapes)
    texts = large_vocabulary.prompts(16 * steps, 32, vocab)
    names = str(folder / "student"), str(folder / "teacher")
    new = 16 if quick else 128
    return Work(*names, texts, 16, 1, new_tokens=new, prompt_tokens=32, steps=steps, bf16=bf16)


def growing(per_step: int, steps: int) -> Work:
    """The built-in pair with any number of prompts per step.

    Batches are small, so that even the smallest step has several of them: a step below one batch would need less
    memory, and say nothing about growth.
    """
    whole = small(1, 1).__dict__
    from retort.tasks import countdown

    pool = [str(row["prompt"]) for row in countdown.rows("train", None)]
    texts = tuple(pool[i % len(pool)] for i in range(per_step))
    return Work(
        **{**whole, "prompts": texts, "per_step": per_step, "steps": steps, "batch_tokens": 2048, "parallel": 128}
    )


def work_of(arguments: argparse.Namespace, pair: str) -> Work:
    """What a worker has to do."""
    bf16 = arguments.dtype == "bf16"
    if pair == "small":
        return small(arguments.steps or (3 if arguments.quick else 10), 8 if arguments.quick else 64, bf16=bf16)
    if pair == "large":
        return large(Path(arguments.models), arguments.steps or 2, bf16=bf16, quick=arguments.quick)
    return growing(arguments.prompts, arguments.steps or 3)


def worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(arguments.threads)
    if arguments.processor_time:
        time.perf_counter = time.process_time  # the clock of steps and of phases; this process does nothing else
    return SYSTEMS[arguments.system](work_of(arguments, arguments.pairs[0]), arguments.threads)


def compare(arguments: argparse.Namespace, pair: str, systems: list[str], rounds: int) -> dict[str, Any]:
    """All systems on one pair, alternated; every round in another order."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for number in range(rounds):
        for name in systems if number % 2 == 0 else reversed(systems):
            runs[name].append(_start(arguments, pair, name))
    return {name: merged(found) for name, found in runs.items()}


def _start(arguments: argparse.Namespace, pair: str, system: str, *more: str) -> dict[str, Any]:
    words = ["--pairs", pair, "--system", system, "--models", arguments.models, "--dtype", arguments.dtype]
    words += ["--threads", str(arguments.threads), *more]
    words += [
        *(["--steps", str(arguments.steps)] if arguments.steps else ()),
        *(["--quick"] if arguments.quick else ()),
        *(["--processor-time"] if arguments.processor_time else ()),
    ]
    return measure.in_own_process(Path(__file__), words, timeout=400)


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one system as one: medians over all their counted steps."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"failed": runs[0]["failed"]}
    seconds = [value for run in good for value in run["seconds"]]
    tokens = [value for run in good for value in run["tokens"]]
    rates = [count / took for count, took in zip(tokens, seconds, strict=True)]
    names = {name for run in good for name in run["phases"]}
    return {
        "tokens_per_second": measure.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "seconds": measure.median(seconds),
        "tokens": sum(tokens) / len(tokens),
        "steps": len(seconds),
        "phases": {name: sum(run["phases"].get(name, 0.0) for run in good) / len(good) for name in sorted(names)},
        "peak_rss_mib": max(run["peak_rss_mib"] for run in good),
        "peak_above_mib": max(run["peak_above_mib"] for run in good),
        "failed_runs": [run["failed"] for run in runs if "failed" in run],
    }


def pair_table(pair: str, found: Mapping[str, Any]) -> str:
    """One pair: a line per system, and how much faster Retort is."""
    header = [
        "system",
        "tokens/s",
        "slowest to fastest",
        "s/step",
        "tokens/step",
        "steps",
        "Retort is",
        "peak RSS MiB",
        "s by phase",
    ]
    own = found.get("retort", {}).get("tokens_per_second")
    rows: list[list[Any]] = []
    for name, one in found.items():
        if "failed" in one:
            rows.append([name, *[None] * 7, one["failed"]])
            continue
        phases = ", ".join(f"{phase} {took:.2f}" for phase, took in one["phases"].items())
        ratio = f"{own / one['tokens_per_second']:.2f} x as fast" if own and name != "retort" else None
        spread = f"{one['slowest']:.0f} to {one['fastest']:.0f}"
        numbers = [
            one["tokens_per_second"],
            spread,
            one["seconds"],
            one["tokens"],
            one["steps"],
            ratio,
            one["peak_rss_mib"],
        ]
        rows.append([name, *numbers, phases])
    return f"### {pair}\n\n" + measure.markdown(header, rows)


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Retort at growing steps, one process each."""
    sizes = (4, 16) if arguments.quick else GROWTH
    return {str(count): _start(arguments, "growth", "retort", "--prompts", str(count)) for count in sizes}


def growth_table(found: Mapping[str, Any]) -> str:
    """Time per token and memory, by tokens per step, and how far they are from flat."""
    rows: list[list[Any]] = []
    for prompts, one in found.items():
        if "failed" in one:
            rows.append([prompts, None, None, None, one["failed"]])
            continue
        tokens, seconds = sum(one["tokens"]), sum(one["seconds"])
        each = tokens / len(one["tokens"])
        rows.append([prompts, each, 1e6 * seconds / tokens, one["peak_rss_mib"], f"{one['peak_above_mib']:.0f}"])
    header = [
        "prompts/step",
        "tokens/step",
        "microseconds/token",
        "peak RSS MiB",
        "MiB above the end of the first step",
    ]
    lines = ["### growth: Retort, the built-in pair", "", measure.markdown(header, rows)]
    times = [row[2] for row in rows if row[2] is not None]
    if times:
        middle = (max(times) + min(times)) / 2
        lines += ["", f"Time per token varies by ±{100 * (max(times) - middle) / middle:.0f} % around its middle."]
    return "\n".join(lines)


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument(
        "--pairs", nargs="+", choices=("small", "large", "growth"), default=["small", "large", "growth"]
    )
    parser.add_argument("--growth", action="store_true", help="the same as --pairs growth")
    parser.add_argument("--rounds", type=int, help="runs of each system; default 2")
    parser.add_argument(
        "--steps", type=int, help="per run, the warming one included; default 10 for small, 2 for large, 3 for growth"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS), help="who takes part; default: all")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds and not the clock's, on a machine with other work (with --threads 1)",
    )
    parser.add_argument("--models", help="folder of the large pair, kept; default: a temporary one")
    parser.add_argument("--table", action="store_true", help="only the tables (Markdown), no progress")
    parser.add_argument("--json", type=Path, help="write all numbers here, too")
    parser.add_argument("--system", choices=tuple(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=int, default=64, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.growth:
        given.pairs = ["growth"]
    return given


def main() -> None:
    """The command."""
    arguments = read_arguments()
    if arguments.system is not None:
        print(json.dumps(worker(arguments)))
        return
    about = measure.machine("cpu", arguments.threads)
    found: dict[str, Any] = {"pairs": {}, "dtype": arguments.dtype}
    texts: list[str] = [f"dtype {arguments.dtype}, attention sdpa, exact reverse KL on the student's own rollouts"]
    with tempfile.TemporaryDirectory() as folder:
        arguments.models = arguments.models or folder
        for pair in arguments.pairs:
            if pair == "growth":
                found["growth"] = growth(arguments)
                texts.append(growth_table(found["growth"]))
            else:
                if pair == "large":
                    work_of(arguments, pair)  # written once, here, and not by whoever comes first
                systems = arguments.systems or (list(SYSTEMS) if pair == "small" else ["retort", "trl, tuned"])
                rounds = arguments.rounds or (1 if arguments.quick else 2)
                found["pairs"][pair] = compare(arguments, pair, systems, rounds)
                texts.append(pair_table(pair, found["pairs"][pair]))
            if not arguments.table:
                measure.progress(texts[-1])
    measure.finish(about, found, "\n\n".join(texts), arguments.json)


if __name__ == "__main__":
    main()
