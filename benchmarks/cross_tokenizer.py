"""Methods for two tokenizers on a real pair of models: runs, and what held-out prompts say before and after.

    python benchmarks/cross_tokenizer.py train real --student SmolLM2-135M-Instruct --teacher gemma-3-270m \
        --cut SmolLM2-20-layers --data rows.jsonl             # one run for each method, in real/strict_ct and so on
    python benchmarks/cross_tokenizer.py judge real --held-out heldout.jsonl
    python benchmarks/cross_tokenizer.py table real

`train` stops and resumes like `retort train`, which it calls; `--only uld,same` takes some of the runs. `same` is the
run with one tokenizer: the student with some of its layers cut out (`--cut`) learns from the whole student.

`judge` reads runs as they lie in the folder, also those of an older version of Retort: it needs their `config.json` and
`model` and nothing that they measured themselves. Every model writes answers to the same prompts with the same random
numbers, at temperature 1, by `retort eval`. What is judged already is left alone, so it can be called while runs go on.

`table` needs no model. Its tokens per second are those of the whole run by phase: tokens of all completions, divided by
the seconds of a phase. The peak is that of the run's process, and is known of runs that `train` started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("strict_ct", "simct", "opd", "uld")
#: The run with one tokenizer, and its method.
SAME, METHOD_OF_SAME = "same", "opd"
#: One thread, little memory. The held-out prompts are `judge`'s, so that all models are measured by one version.
TRAINING = (
    *("precision=fp32", "threads=1", "steps=150", "seed=0", "rollout.prompts=4", "method.samples=1"),
    *("rollout.max_new_tokens=32", "optimizer.learning_rate=2e-5", "optimizer.warmup=5", "optimizer.batch_tokens=2048"),
    *("checkpoint.every=25", "checkpoint.keep=1", "eval.problems=0"),
)
JUDGING = (
    *("precision=fp32", "threads=1", "seed=0", "temperature=1", "top_p=1", "samples=2", "max_new_tokens=64"),
    *("problems=1000000", "optimizer.batch_tokens=2048", "rollout.parallel=32"),
)
#: Settings of a run that change what its models read or where they end: `judge` takes them over.
READING = ("rendered", "stop", "thinking", "date")
PHASES = ("generate", "teacher", "score", "student", "loss", "backward", "optimizer", "step")
PER_BYTE, IN_UNITS = "reverse_kl_per_byte", "bytes_in_units"


@dataclass(frozen=True)
class Run:
    """The folder of a run, whoever started it."""

    folder: Path

    @property
    def name(self) -> str:
        """Its name in the tables."""
        return self.folder.name

    @property
    def config(self) -> Mapping[str, Any]:
        """Its settings."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / "model" / "config.json").exists()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of its steps."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        return [json.loads(line) for line in lines if line]

    @property
    def pair(self) -> tuple[str, str]:
        """Names of student and teacher."""
        return Path(self.config["student"]).name, Path(self.config["teacher"]).name


def runs(folder: Path) -> list[Run]:
    """The runs in a folder; those with one tokenizer last."""
    found = [Run(path.parent) for path in sorted(folder.glob("*/config.json"))]
    order = {name: place for place, name in enumerate((*METHODS, SAME))}
    return sorted(found, key=lambda run: (order.get(run.name, len(METHODS)), run.name))


# --- train ---


def training(name: str, arguments: argparse.Namespace) -> list[str]:
    """The words of `retort` that start one run, or resume it."""
    folder = Path(arguments.folder) / name
    if (folder / "config.json").exists():
        return ["train", "--resume", str(folder)]
    student, teacher = (arguments.cut, arguments.student) if name == SAME else (arguments.student, arguments.teacher)
    words = ["train", "--method", METHOD_OF_SAME if name == SAME else name, "--student", student, "--teacher", teacher]
    return [*words, "--data", arguments.data, "--out", str(folder), *TRAINING, *arguments.settings]


def train(arguments: argparse.Namespace) -> int:
    """Starts or resumes the runs, one after the other; the first that fails ends it."""
    names = [*METHODS, *([SAME] if arguments.cut else [])]
    unknown = set(arguments.only or names) - set(names)
    if unknown:
        sys.exit(f"error: no run is called {', '.join(sorted(unknown))}; there are {', '.join(names)}"
                 f"{'' if arguments.cut else f' ({SAME} needs --cut)'}")  # fmt: skip
    for name in arguments.only or names:
        folder = Path(arguments.folder) / name
        if Run(folder).finished:
            continue
        words = training(name, arguments)
        print("+ retort", *words, flush=True)
        process = subprocess.Popen([sys.executable, "-m", "retort", *words])
        _, status, used = os.wait4(process.pid, 0)
        note(folder, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        if status:
            return os.waitstatus_to_exitcode(status)
    return 0


def peak_file(folder: Path) -> Path:
    """Where the peak memory of a run is kept: beside its folder, in which only Retort writes."""
    return folder.parent / f"{folder.name}.peak.json"


def note(folder: Path, peak: int) -> None:
    """Keeps the peak memory of a run, bytes; of one that was resumed the highest."""
    path = peak_file(folder)
    before = json.loads(path.read_text())["bytes"] if path.exists() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bytes": max(peak, before)}) + "\n")


# --- judge ---


def judgements(run: Run, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The words of `retort eval`, by the name of the file that keeps what it says."""
    config = run.config
    reading = {name: (config.get("rollout") or {}).get(name) for name in READING}
    words = [*JUDGING, *(f"rollout.{name}={json.dumps(value)}" for name, value in reading.items() if value)]
    words += [*([f"task={config['task']}"] if config.get("task") else []), *arguments.settings]
    against = ["--data", arguments.held_out, "--teacher", str(config["teacher"])]
    found = {before_file(run): ["eval", str(config["student"]), *against, *words]}
    if run.finished:
        found[f"{run.name}.json"] = ["eval", str(run.folder / "model"), *against, *words]
    if arguments.teachers:
        found[f"{run.pair[1]}.teacher.json"] = ["eval", str(config["teacher"]), "--data", arguments.held_out, *words]
    return found


def before_file(run: Run) -> str:
    """Name of the file about a run's student before it: runs of one pair share it."""
    return f"{'.'.join(run.pair)}.before.json"


def judge(arguments: argparse.Namespace) -> int:
    """Evaluates every student before and after, and writes what `retort eval` says into `judged`."""
    judged = Path(arguments.folder) / "judged"
    judged.mkdir(parents=True, exist_ok=True)
    for run in runs(Path(arguments.folder)):
        if not run.finished:
            print(f"{run.name}: {len(run.metrics)} steps, no end yet; its student before is judged alone", flush=True)
        for name, words in judgements(run, arguments).items():
            if _read(judged / name).get("words") == words:
                continue
            print("+ retort", *words, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "retort", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                return done.returncode
            kept = {"words": words, "table": json.loads(done.stdout)}
            (judged / name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- table ---


def cells(folder: Path, name: str) -> dict[str, Any]:
    """The row of a model that was judged, its accuracy as `accuracy`; empty if it was not."""
    table = _read(folder / "judged" / name).get("table")
    if table is None:
        return {}
    row: dict[str, Any] = table["rows"][0]
    return {**row, "accuracy": row.get(f"avg@{table['k']}")}


def cell(found: Mapping[str, Any], name: str, form: str = "{:.3f}") -> str:
    """A number with its interval."""
    value = found.get(name)
    if not value:
        return "–"
    shown = [form.format(value[end]) for end in ("value", "low", "high") if value[end] is not None]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0]


def held_out(folder: Path) -> list[str]:
    """The table of the models, in Markdown."""
    found = [
        "| run | student ← teacher | steps | nats a byte, before | after | bytes scored | right before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs(folder):
        before, after = cells(folder, before_file(run)), cells(folder, f"{run.name}.json")
        scored = cell(after, IN_UNITS, "{:.1%}") if IN_UNITS in after or not after else "100%, by tokens"
        found.append(
            f"| `{run.name}` | {' ← '.join(run.pair)} | {len(run.metrics)} | {cell(before, PER_BYTE)} | "
            f"{cell(after, PER_BYTE)} | {scored} | {cell(before, 'accuracy', '{:.1%}')} | "
            f"{cell(after, 'accuracy', '{:.1%}')} |"
        )
    teachers = dict.fromkeys(run.pair[1] for run in runs(folder))
    for name in teachers:
        own = cells(folder, f"{name}.teacher.json")
        if own:
            found.append(f"| teacher | {name} | | | | | {cell(own, 'accuracy', '{:.1%}')} | |")
    return found


def speed(folder: Path) -> list[str]:
    """The table of the runs, in Markdown: tokens per second by phase, and the peak."""
    found = [
        f"| run | tokens | {' | '.join('whole step' if name == 'step' else name for name in PHASES)} | peak, GiB |",
        f"|---|---{'|---' * len(PHASES)}|---|",
    ]
    for run in runs(folder):
        rows = run.metrics
        tokens = sum(row["tokens"] for row in rows)
        seconds = {name: sum(row.get(f"time/{name}", 0.0) for row in rows) for name in PHASES}
        rates = [f"{tokens / spent:,.1f}" if spent else "–" for spent in seconds.values()]
        peak = _read(peak_file(run.folder)).get("bytes")
        memory = "–" if peak is None else f"{peak / 2**30:.2f}"
        found.append(f"| `{run.name}` | {tokens:,} | {' | '.join(rates)} | {memory} |")
    return found


def table(arguments: argparse.Namespace) -> int:
    """Prints both tables, and the settings by which the models were judged."""
    folder = Path(arguments.folder)
    print("\n".join([*held_out(folder), "", *speed(folder)]))
    judged = [_read(path) for path in sorted((folder / "judged").glob("*.json"))]
    how = {" ".join(word for word in one["words"] if "=" in word) for one in judged}
    about = {(one["table"]["problems"], one["table"].get("graded"), one["table"]["k"]) for one in judged}
    for prompts, graded, samples in sorted(about, key=str):
        of_them = "all" if graded is None else f"{graded} of them"
        print(
            f"\n{prompts} held-out prompts, {of_them} graded, {samples} completions each; 95 % intervals over prompts."
        )
    print("\n".join(f"\nSettings of `retort eval`: {words}" for words in sorted(how)))
    if len(how) > 1 or len(about) > 1:
        print("\nThese models were judged in different ways; call `judge` once more.")
        return 1
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "judge", "table"))
    parser.add_argument("folder", help="where the runs are, or are to be")
    parser.add_argument("settings", nargs="*", help="further settings of `retort train` or `retort eval`")
    for name, about in (
        ("student", "model folder"),
        ("teacher", "model folder, with another tokenizer"),
        ("cut", f"a smaller student with the student's tokenizer, for the run `{SAME}`"),
        ("data", "JSON lines to learn from"),
        ("held-out", "JSON lines to judge by"),
    ):
        parser.add_argument(f"--{name}", help=about)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of runs, with commas between")
    parser.add_argument("--teachers", action="store_true", help="judge the teachers' own answers, too")
    arguments = parser.parse_intermixed_args()
    needed = {"train": ("student", "teacher", "data"), "judge": ("held_out",), "table": ()}[arguments.command]
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"{arguments.command} needs {' and '.join(missing)}")
    return {"train": train, "judge": judge, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
