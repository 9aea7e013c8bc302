"""Two commits, side by side on this machine: are the numbers of a run the same, to the last bit?

    python benchmarks/same_numbers.py HEAD~3 HEAD
    python benchmarks/same_numbers.py HEAD . --only gkd,lora     # the working tree, as it lies

Each case is a run of ten batches on a built-in task, in fp32 and on one thread, by the code of each commit in a
process of its own. Compared are the lines of metrics.jsonl and rollouts.jsonl without what depends on a clock,
eval.json, every tensor of the last checkpoint and the exported weights. The exit code is 1 if anything differs, and
what differs first is said. What only one of the two writes (a new metric) is listed, and is no difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Small enough for seconds, with two updates a batch, an evaluation in the middle and a checkpoint before the end.
SMALL = [
    *("--steps=10", "--seed=3", "threads=1", "precision=fp32", "device=cpu", "checks=warn", "checkpoint.every=4"),
    *("optimizer.updates=2", "optimizer.learning_rate=0.001", "optimizer.warmup=0", "optimizer.batch_tokens=256"),
    *("rollout.prompts=8", "eval.problems=8", "eval.samples=2", "eval.every=5"),
]
#: One for each way through the pipeline: estimators, controllers, self-teachers, adapters, replay, mixtures.
CASES: dict[str, list[str]] = {
    "eopd": ["--method=eopd"],
    "opd": ["--method=opd", "optimizer.epochs=2"],
    "gkd": ["--method=gkd"],  # a mixture of rollouts and the data's responses
    "skew_kl": ["--method=skew_kl"],  # replay
    "arkd": ["--method=arkd"],  # a controller that learns
    "decoupled_kl": ["--method=decoupled_kl", "method.prefix=teacher"],
    "topk_kl": ["--method=topk_kl"],
    "vopd": ["--method=vopd", "cold_start.steps=2"],
    "exopd": ["--method=exopd"],  # a base model
    "rlsd": ["--method=rlsd", "--data=coached"],  # rewards and a teacher that is shown the solution
    "sdpo": ["--method=sdpo", "--data=coached"],  # its own teacher, shown a sibling
    "peer_opd": ["--method=peer_opd", "--data=coached"],
    "unisd": ["--method=unisd", "--data=coached"],
    "lora": ["--method=eopd", "lora.rank=4"],
}


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The code of a commit, in a folder of its own; of `.`, the working tree."""
    if commit == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="retort-commit-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def run(code: Path, words: list[str], out: Path) -> str | None:
    """One run by the code in a folder; None, or the last line of what it complained of."""
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "retort", "train", f"--out={out}", *SMALL, *words]
    done = subprocess.run(command, env=environment, cwd=code, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock."""
    return {key: value for key, value in row.items() if not key.startswith(("time/", "tokens_per_second"))}


def lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [untimed(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor in the safetensors files of a folder, by file and name."""
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.stem}/{name}": x for file in files for name, x in load_file(file).items()}


def different(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """What differs between two runs, and what only one of them has.

    Args:
        old: Folder of a run.
        new: Of the other.
    """
    wrong, besides = list[str](), set[str]()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = lines(old / name), lines(new / name)
        if len(ours) != len(theirs):
            wrong.append(f"{name}: {len(ours)} lines, and {len(theirs)}")
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
            besides |= {f"{name}: {key}" for key in a.keys() ^ b.keys()}
            wrong += [f"{name}, line {number}: {key}" for key in a.keys() & b.keys() if a[key] != b[key]]
    judged = [json.loads((folder / "eval.json").read_text())["rows"] for folder in (old, new)]
    for a, b in zip(*judged, strict=True):
        besides |= {f"eval.json: {key}" for key in a.keys() ^ b.keys()}
        wrong += [f"eval.json, {a['who']}: {key}" for key in a.keys() & b.keys() if a[key] != b[key]]
    for part in ("model", f"checkpoints/{newest(old)}"):
        before, after = tensors(old / part), tensors(new / part)
        besides |= {f"{part}: {name}" for name in before.keys() ^ after.keys()}
        wrong += [f"{part}: {name}" for name in before.keys() & after.keys() if not same(before[name], after[name])]
    return wrong, sorted(besides)


def same(one: Any, other: Any) -> bool:
    """Whether two tensors are the same bits; NaN is like NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def newest(run_folder: Path) -> str:
    """The name of a run's newest checkpoint."""
    return max((run_folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])).name


def compare(old: Path, new: Path, name: str, out: Path) -> bool:
    """Runs one case by both and says how it went."""
    folders = [out / side / name for side in ("old", "new")]
    with ThreadPoolExecutor(2) as both:
        failed = list(both.map(lambda pair: run(pair[0], CASES[name], pair[1]), zip((old, new), folders, strict=True)))
    for side, complaint in zip(("old", "new"), failed, strict=True):
        if complaint is not None:
            print(f"{name:<14} {side} did not run: {complaint}", flush=True)
    if any(failed):
        return False
    wrong, besides = different(*folders)
    said = "same bits" if not wrong else f"{len(wrong)} differences, first: {'; '.join(wrong[:3])}"
    print(f"{name:<14} {said}{one_sided(besides)}", flush=True)
    return not wrong


def one_sided(besides: list[str]) -> str:
    """What only one of two runs has, in brackets."""
    return f" (only one has {', '.join(besides[:4])}{', ...' if len(besides) > 4 else ''})" if besides else ""


def main() -> int:
    """Compares, and says so."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="commit")
    parser.add_argument("new", help="commit, or . for the working tree")
    parser.add_argument("--only", default=",".join(CASES), help="cases, by commas")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    given = parser.parse_args()
    names = given.only.split(",")
    unknown = sorted(set(names) - CASES.keys())
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    with contextlib.ExitStack() as stack:
        out = given.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retort-same-")))
        old, new = (stack.enter_context(checked_out(commit)) for commit in (given.old, given.new))
        equal = [compare(old, new, name, out.resolve()) for name in names]
    print(f"{sum(equal)} of {len(equal)} cases have the same numbers")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
