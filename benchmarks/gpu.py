"""Everything that only a GPU can say, in one go of at most eight minutes: `make gpu`.

    python benchmarks/gpu.py                            # writes runs/gpu-DATE.md
    python benchmarks/gpu.py --device cpu --small       # the same in small on a CPU: whether the script itself works

Parts: the kernels' tests; the loss core beside TRL's own Triton kernel and Liger at a vocabulary of 152k; the demo with
resume, whose numbers must be equal; a whole step of a pair in the shape of Qwen3-0.6B beside TRL in bf16, with memory;
how often a step waits for the device, and where. Each part has a process and a time limit of its own, and what fails
in one is written down and stops no other. Without a GPU it says so and exits with 2; with a part that failed, with 1.

To have all of it: `pip install .[benchmarks]`, after a build of torch for your machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import large_vocabulary
import measure
import torch
from training_systems import SYSTEMS, Work

HERE = Path(__file__).resolve()
#: Qwen3-0.6B's width and depth, and a teacher twice as wide.
SHAPES = {"student": (1024, 28), "teacher": (2048, 28)}
SMALL = {"student": (64, 2), "teacher": (64, 2)}


@dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        title: Of its section.
        words: Of the command, after Python.
        limit: Seconds.
        passes: Exit codes that are no failure (pytest has one for tests that were all left out).
    """

    title: str
    words: Sequence[str]
    limit: int
    passes: Sequence[int] = (0,)


def parts(device: str, *, small: bool) -> list[Part]:
    """All of them; their limits add up to eight minutes."""
    tests = str(HERE.parents[1] / "tests" / "kernels")
    sizes = ["--steps", *(["16"] if small else ["8192", "16384"]), *(["--small"] if small else ["--rounds", "2"])]
    core = [str(HERE.parent / "loss_core.py"), "--device", device, "--dtype", "bfloat16", *sizes]
    own = [str(HERE), "--device", device, *(["--small"] if small else []), "--part"]
    return [
        Part("Tests of the kernels", ["-m", "pytest", "-q", "-p", "no:cacheprovider", tests], 90, (0, 5)),
        Part("Loss core, vocabulary 152k", core, 120),
        Part("The demo, and resumed", [*own, "demo"], 90),
        Part("A whole step: Retort", [*own, "step", "retort"], 75),
        Part("A whole step: TRL", [*own, "step", "trl, tuned"], 75),
        Part("Waits for the device", [*own, "waits"], 30),
    ]


def run(part: Part) -> tuple[bool, str]:
    """Whether a part passed, and what it said."""
    command = [sys.executable, *part.words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=part.limit, check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return False, f"{said.strip()}\n\nstopped after {part.limit} s".strip()
    if done.returncode in part.passes:
        return True, done.stdout.strip()
    return False, f"{done.stdout.strip()}\n\n{_end(done.stderr)}\n\nexit {done.returncode}".strip()


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-8:])


def demo(device: str, *, small: bool) -> None:
    """A run of the built-in pair, and again from its middle: the same numbers, or an error."""
    from retort import distill
    from retort.train import runner
    from retort.train.events.observe import Silent

    steps = 4 if small else 12
    settings: dict[str, Any] = {
        "device": device,
        "checkpoint": {"every": steps // 2, "keep": 9},
        "eval": {"problems": 8 if small else 128},
        **({"rollout": {"prompts": 4}} if small else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        start = time.perf_counter()
        whole = distill(out=str(first), steps=steps, settings=settings, observer=Silent())
        took = time.perf_counter() - start
        shutil.copytree(first, second)
        again = runner.resume(second / "checkpoints" / f"step-{steps // 2}").go()
        rows = [_numbers(path / "metrics.jsonl") for path in (first, second)]
        config = json.loads((first / "config.json").read_text())
    print(f"{steps} steps with the judging before and after in {took:.1f} s, precision {config['precision']}.")
    if rows[0] != rows[1] or whole.results != again.results:
        apart = sorted({k for a, b in zip(*rows, strict=True) for k in a if a[k] != b[k]})
        raise SystemExit(f"resumed from the middle, other numbers: {', '.join(apart) or 'the table'}")
    print("Resumed from the middle: every number of every step, and the table, are equal.")


def _numbers(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics without the clock's."""
    clock = ("time/", "tokens_per_second")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def step(device: str, system: str, *, small: bool) -> None:
    """Whole steps of one system: seconds, tokens per second, memory."""
    vocab, new, count = (512, 8, 4) if small else (large_vocabulary.VOCAB, 128, 16)
    with tempfile.TemporaryDirectory() as folder:
        large_vocabulary.build_pair(Path(folder), vocab=vocab, shapes=SMALL if small else SHAPES)
        names = str(Path(folder) / "student"), str(Path(folder) / "teacher")
        texts = large_vocabulary.prompts(count * 4, 32, vocab)
        work = Work(
            *names, texts, count, 1, new_tokens=new, prompt_tokens=32, steps=4, bf16=device == "cuda", device=device
        )
        found = SYSTEMS[system](work, torch.get_num_threads())
    seconds = measure.median(found["seconds"])
    rate = measure.median([n / s for n, s in zip(found["tokens"], found["seconds"], strict=True)])
    cells = [system, seconds, rate, found["peak_mib"], found["peak_above_mib"]]
    print(measure.markdown(["", "s a step", "tokens a second", "peak, MiB", "above the first step, MiB"], [cells]))
    print("\nmeans, s: " + ", ".join(f"{name} {value:.2f}" for name, value in found["phases"].items()))


def waits(device: str, *, small: bool) -> None:
    """Places at which Python waited for the device, as torch warns of them, per step."""
    from retort import distill
    from retort.train.events.observe import Silent

    steps = 2 if small else 4
    settings = {"device": device, "eval": {"problems": 0}, "checkpoint": {"every": 0}}
    settings |= {"rollout": {"prompts": 4}} if small else {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        distill(out=str(Path(folder) / "run"), steps=steps, settings=settings, observer=Silent())
    found = Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    print(f"{found.total() / steps:.1f} a step, loading and generation included; most of them at:\n")
    print(measure.markdown(["where", "a step"], [[place, n / steps] for place, n in found.most_common(12)]))


OWN: Mapping[str, Callable[..., None]] = {"demo": demo, "step": step, "waits": waits}


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a trial of the script itself")
    parser.add_argument("--out", type=Path, help="file for the tables; default: runs/gpu-DATE.md")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch sees no CUDA device, so nothing was measured", file=sys.stderr)
        return 2
    if given.part:
        OWN[given.part[0]](given.device, *given.part[1:], small=given.small)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = given.out or Path("runs") / f"gpu-{time.strftime('%Y-%m-%d-%H%M%S')}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    sections, failed = [f"# {measure.in_words(measure.machine(given.device, torch.get_num_threads()))}"], 0
    for part in parts(given.device, small=given.small):
        measure.progress(f"{part.title} (at most {part.limit} s)")
        start = time.perf_counter()
        passed, said = run(part)
        failed += not passed
        verdict = "" if passed else "FAILED, "
        sections.append(f"## {part.title}\n\n{verdict}{time.perf_counter() - start:.0f} s\n\n{said}")
        out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")  # what was found stays, whatever comes next
    print(out.read_text(encoding="utf-8"))
    print(f"{failed} of {len(sections) - 1} parts failed; written to {out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
