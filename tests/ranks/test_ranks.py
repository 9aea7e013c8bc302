"""A run under torchrun is the run of one process: the same numbers, the same folder, the same resume.

`make ranks` runs this; torchrun is started a few times in all, and each time makes many runs (`worker.py`).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retort.train.storage import checkpoint

pytestmark = pytest.mark.ranks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from worker import CASES  # noqa: E402

#: Those of which a run in one process is compared with one on two ranks.
ALIKE = [name for name in CASES if name != "plain"]
TOLERANCE = 1e-5


def command(ranks: int, *words: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [*(torchrun if ranks > 1 else [sys.executable]), *words]


def environment() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), found.get("PYTHONPATH", "")])
    return found | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def work(ranks: int, folder: Path, *jobs: str) -> Path:
    """Makes some runs in a folder."""
    folder.mkdir(exist_ok=True)
    words = command(ranks, str(HERE / "worker.py"), str(folder), *jobs)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def rows(folder: Path, words: str, ranks: int, rank: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{words}.{ranks}-{rank}.json").read_text())
    return found


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(run / "checkpoints" / f"step-{step}").weights)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two tensors of a name, relative to their norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-9)) for name in one)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return work(1, tmp_path_factory.mktemp("one"), *ALIKE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks; one of them goes on with a run of which a rank was killed."""
    folder = tmp_path_factory.mktemp("two")
    killed(folder)
    return work(2, folder, *ALIKE, "plain", "plain+", "sdpo+2")


def killed(folder: Path) -> None:
    """Kills a rank in the middle of a run, and waits for the other."""
    words = command(2, str(HERE / "worker.py"), str(folder), "plain+")
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(words, env=environment(), stdout=log, stderr=log)
        try:
            wait_for(lambda: (folder / "plain+" / "checkpoints" / "step-2").exists(), process)
            os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
            assert process.wait(timeout=120) != 0
        finally:
            process.kill()


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not there():
        assert process.poll() is None, "it ended before it came so far"
        time.sleep(0.02)


def ranks_of(torchrun: int) -> list[int]:
    """The processes that torchrun has started, in order of rank."""
    children = Path(f"/proc/{torchrun}/task").glob("*/children")
    return sorted(int(pid) for own in children for pid in own.read_text().split())


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_are_one_process(one: Path, two: Path, name: str) -> None:
    """Loss, gradient norm and every other number of every step, and the weights at the end."""
    alone = rows(one, name, 1)
    for rank in (0, 1):
        for whole, own in zip(alone, rows(two, name, 2, rank), strict=True):
            assert own.keys() == whole.keys()
            for metric, value in whole.items():
                if isinstance(value, float) and math.isfinite(value):
                    assert own[metric] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), metric
                else:
                    assert own[metric] == value or value != value, metric
    assert apart(weights(one / name, 5), weights(two / name, 5)) < TOLERANCE
    exported = [load_file(folder / name / "model" / "model.safetensors") for folder in (one, two)]
    assert apart(*exported) < TOLERANCE


def test_the_folder_is_the_same(one: Path, two: Path) -> None:
    """One line for each step, and the same files, but for a file of slices for each rank in a checkpoint."""
    for name in ("judged", "skew_kl", "lora"):
        here, there = one / name, two / name
        assert files(here) == files(there)
        slices = list((there / "checkpoints" / "step-5" / "weights").iterdir())
        assert sorted(path.name[:11] for path in slices) == ["shard-00001", "shard-00002"]
        for kind in ("metrics.jsonl", "rollouts.jsonl"):
            assert len((here / kind).read_text().splitlines()) == len((there / kind).read_text().splitlines())
    table, other = (json.loads((folder / "judged" / "eval.json").read_text()) for folder in (one, two))
    assert [row["who"] for row in table["rows"]] == [row["who"] for row in other["rows"]]
    assert table["pass_at"] == other["pass_at"]


def files(folder: Path) -> set[str]:
    """Its files; those of slices by the name that they have in one process."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return {re.sub(r"/shard-[^/]*(?=\.safetensors)", "", name) for name in found}


def test_a_killed_rank_ends_the_other_and_nothing_is_lost(two: Path) -> None:
    """The run that goes on from the last checkpoint ends with the bits of one that was never disturbed."""
    assert "lost another rank" in (two / "killed.log").read_text()
    assert len(rows(two, "plain+", 2)) < 6
    assert len((two / "plain+" / "metrics.jsonl").read_text().splitlines()) == 6
    mine, other = weights(two / "plain", 6), weights(two / "plain+", 6)
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_another_number_of_ranks_goes_on(one: Path, two: Path) -> None:
    """Two ranks, then one process, then three ranks."""
    work(1, two, "sdpo+4")
    work(3, two, "sdpo+")
    assert checkpoint.newest(two / "sdpo+" / "checkpoints") == two / "sdpo+" / "checkpoints" / "step-5"
    for whole, own in zip(rows(one, "sdpo", 1)[4:], rows(two, "sdpo+", 3), strict=True):
        assert own["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE)
        assert own["grad_norm"] == pytest.approx(whole["grad_norm"], rel=TOLERANCE)
    assert apart(weights(one / "sdpo", 5), weights(two / "sdpo+", 5)) < TOLERANCE


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    words = command(2, "-m", "retort", "train", "rollout.prompts=1", f"--out={tmp_path / 'run'}", "device=cpu")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("retort: ")]
    assert len(said) == 1
    assert said[0].startswith("retort: a batch of 1 prompts is less than one for each of 2 ranks")
    assert not (tmp_path / "run").exists()
