"""A run under torchrun is the run of one process: the same numbers, the same folder, the same resume.

`make ranks` runs this; torchrun is started a few times in all, and each time makes many runs (`worker.py`).
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served import Judge, Process

from retort import config as configuration
from retort.train.models.models import located
from retort.train.storage import checkpoint

pytestmark = pytest.mark.ranks

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from worker import ADDRESSES, CACHING, CASES, JUDGED, SERVED, SMALL, WRITTEN  # noqa: E402

#: Those of which a run in one process is compared with one on two ranks.
ALIKE = [name for name in CASES if not name.startswith("plain") and name not in WRITTEN]
BF16 = ["plain_bf16", "plain_bf16_lora"]
#: And of these with one on three ranks: both estimators, statistics of the whole batch, a teacher that moves, LoRA.
THREE = ["opd", "gkd", "dasd", "sdpo", "lora"]
TOLERANCE = 1e-5
#: Of the moments at which ranks are killed: RANKS_SEED in the environment makes those of an earlier call again.
SEED = int(os.environ.get("RANKS_SEED", time.time_ns() % 2**32))
_draw = random.Random(SEED)
#: By the run that goes on afterwards: the rank, the step, and how much of it is done, see `dying.py`.
KILLED: dict[str, tuple[int, int, float | str]] = {
    "plain:0+": (0, _draw.randint(3, 5), round(_draw.random(), 4)),
    "plain:1+": (1, _draw.randint(3, 5), round(_draw.random(), 4)),
    "plain:saving+": (0, 3, "checkpoint"),
    "plain_ahead:1+": (1, _draw.randint(3, 5), round(_draw.random(), 4)),
}


def command(ranks: int, *words: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [*(torchrun if ranks > 1 else [sys.executable]), *words]


def environment() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), found.get("PYTHONPATH", "")])
    return found | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def work(ranks: int, folder: Path, *jobs: str, servers: dict[str, str] | None = None) -> Path:
    """Makes some runs in a folder; `servers` are addresses, by the variable that holds each."""
    folder.mkdir(exist_ok=True)
    words = command(ranks, str(HERE / "worker.py"), str(folder), *jobs)
    done = subprocess.run(words, env=environment() | (servers or {}), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def rows(folder: Path, words: str, ranks: int, rank: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{words}.{ranks}-{rank}.json").read_text())
    return found


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoints" / f"step-{step}").weights.whole()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two tensors of a name, relative to their norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-9)) for name in one)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A teacher and a judge on servers, which all runs share that need one: to start one takes longer than a run."""
    folder = tmp_path_factory.mktemp("server")
    with ThreadPoolExecutor(2) as pool:
        started = pool.submit(Process, folder, Path(located("countdown:teacher"))), pool.submit(Judge)
    teacher, judge = (own.result() for own in started)
    yield {ADDRESSES[SERVED]: teacher.url, ADDRESSES[JUDGED]: judge.url}
    teacher.end()
    judge.end()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, servers: dict[str, str]) -> Path:
    """Runs in one process. Two processes share them, as there are cores for two ranks."""
    folder = tmp_path_factory.mktemp("one")
    # The worker makes some of the models once in this folder, so one process makes all runs with these.
    jobs = sorted([*ALIKE, *BF16], key=lambda name: "student" in CASES[name])
    parts = jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
    assert not any("student" in CASES[name] for name in parts[0])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda own: work(1, folder, *own, servers=servers), parts))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, servers: dict[str, str]) -> Path:
    """Runs on two ranks; some of them go on with a run of which a rank was killed."""
    folder = tmp_path_factory.mktemp("two")
    # At once, because much of this is one process that starts two, and two that wait for one another.
    with ThreadPoolExecutor(len(KILLED)) as pool:
        list(pool.map(lambda name: killed(folder, name, *KILLED[name]), KILLED))
    ahead = ("plain", "plain_ahead", *KILLED)
    return work(2, folder, *ALIKE, *BF16, *WRITTEN, *ahead, "sdpo+1", CACHING, servers=servers)


def killed(folder: Path, name: str, rank: int, step: int, moment: float | str) -> None:
    """Kills a rank in the middle of a run, and waits for the other."""
    settings = [*flat(configuration.merge(SMALL, CASES[name.partition(":")[0]])), f"out={folder / name}"]
    words = command(2, str(HERE / "dying.py"), str(rank), str(step), str(moment), *settings)
    # The other one ends at once: this is a guard against one that hangs.
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    (folder / f"{name}.log").write_text(done.stderr)


def flat(settings: dict[str, Any], before: str = "") -> list[str]:
    """Settings as words of the command."""
    return [
        word
        for name, value in settings.items()
        for word in (flat(value, f"{name}.") if isinstance(value, dict) else [f"{before}{name}={value}"])
    ]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, one: Path, two: Path) -> Path:
    """Runs on three ranks, in which batches of four prompts do not divide; one goes on with a run of two and of one."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(two / "sdpo+", folder / "sdpo+")
    work(1, folder, "sdpo+2")
    return work(3, folder, *THREE, "sdpo+")


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_are_one_process(one: Path, two: Path, name: str) -> None:
    same(one, two, name, 2)


@pytest.mark.parametrize("name", THREE)
def test_three_ranks_are_one_process(one: Path, three: Path, name: str) -> None:
    same(one, three, name, 3)


def same(one: Path, other: Path, name: str, ranks: int) -> None:
    """Loss, gradient norm and every other number of every step, and the weights at the end."""
    alone = rows(one, name, 1)
    for rank in range(ranks):
        for whole, own in zip(alone, rows(other, name, ranks, rank), strict=True):
            assert own.keys() == whole.keys()
            for metric, value in whole.items():
                if isinstance(value, float) and math.isfinite(value):
                    assert own[metric] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), metric
                else:
                    assert own[metric] == value or value != value, metric
            for metric in ("loss", "grad_norm"):
                assert own[metric] == pytest.approx(whole[metric], rel=TOLERANCE), metric
    assert len(alone) == configuration.merge(SMALL, CASES[name])["steps"]
    assert apart(weights(one / name, len(alone)), weights(other / name, len(alone))) < TOLERANCE
    exported = [load_file(folder / name / "model" / "model.safetensors") for folder in (one, other)]
    assert apart(*exported) < TOLERANCE


def test_workers_write_what_the_ranks_would(two: Path) -> None:
    """To the last bit, in fp32 and with an adapter, whose weights the workers get merged into those of the model."""
    helped, alone = (rows(two, name, 2) for name in WRITTEN)
    assert len(helped) == len(alone) == SMALL["steps"]
    for mine, own in zip(helped, alone, strict=True):
        assert mine.keys() - own.keys() == {"engine/noise_floor", "engine/restarts"}
        # Log-probs of what is learnt beside those of what wrote: 1e-3 nats apart where these are of the step before.
        assert max(own.pop("noise_floor"), mine["noise_floor"], mine["engine/noise_floor"]) < 1e-5
        assert {metric for metric, value in own.items() if mine[metric] != value == value} == set()
    mine, own = (weights(two / name, len(alone)) for name in WRITTEN)
    assert all(torch.equal(mine[name], own[name]) for name in own)


@pytest.mark.parametrize("name", BF16)
def test_products_in_bf16(one: Path, two: Path, name: str) -> None:
    """They differ by rounding to 8 bits, so only the first step is compared; copies in bf16 follow the weights."""
    alone, own = rows(one, name, 1), rows(two, name, 2)
    for whole, divided in zip(alone, own, strict=True):
        assert divided.keys() == whole.keys()
        # Log-probs of what is learnt beside those of what wrote: 3 nats apart where these are of the step before.
        assert divided["noise_floor"] < 0.1
    assert own[0]["loss"] == pytest.approx(alone[0]["loss"], rel=2e-2)
    assert own[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=2e-2)


def test_the_folder_is_the_same(one: Path, two: Path) -> None:
    """One line for each step, and the same files, but for a file of slices for each rank in a checkpoint."""
    for name in ("judged", "skew_kl", "lora"):
        here, there = one / name, two / name
        assert files(here) == files(there)
        last = f"step-{len(rows(two, name, 2))}"
        slices = list((there / "checkpoints" / last / "weights").iterdir())
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


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_ends_the_other_and_nothing_is_lost(two: Path, name: str) -> None:
    """The run that goes on from the last checkpoint ends with the bits of one that was never disturbed."""
    rank, step, moment = KILLED[name]
    print(f"rank {rank} was killed in step {step} at {moment}; RANKS_SEED={SEED} makes the same moments again")
    log = (two / f"{name}.log").read_text()
    (said,) = [line for line in log.splitlines() if line.startswith("retort: ")]
    assert said.startswith(f"retort: rank {1 - rank} of 2 lost another rank"), log[-4000:]
    assert f"go on with: torchrun --nproc-per-node 2 -m retort train --resume {two / name}" in said
    assert "exitcode  : -9 " in log
    assert step - 1 <= 6 - len(rows(two, name, 2)) <= step
    assert len((two / name / "metrics.jsonl").read_text().splitlines()) == 6
    mine, other = weights(two / name.partition(":")[0], 6), weights(two / name, 6)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert not [path for path in (two / name / "checkpoints").iterdir() if path.name.startswith(".writing")]


def test_another_number_of_ranks_goes_on(one: Path, three: Path) -> None:
    """Two ranks, then one process, then three ranks."""
    assert checkpoint.newest(three / "sdpo+" / "checkpoints") == three / "sdpo+" / "checkpoints" / "step-3"
    for whole, own in zip(rows(one, "sdpo", 1)[2:], rows(three, "sdpo+", 3), strict=True):
        assert own["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE)
        assert own["grad_norm"] == pytest.approx(whole["grad_norm"], rel=TOLERANCE)
    assert apart(weights(one / "sdpo", 3), weights(three / "sdpo+", 3)) < TOLERANCE


def test_two_ranks_share_a_cache(two: Path) -> None:
    """Every rank reads and writes one cache, and a run with it is the run without it, see `caching.py`."""
    folder = two / CACHING
    plain = load_file(folder / "plain" / "model" / "model.safetensors")
    for name in ("empty", "full"):
        found = load_file(folder / name / "model" / "model.safetensors")
        assert all(torch.equal(found[key], values) for key, values in plain.items()), name
        assert lines(folder / name) == lines(folder / "plain")
    assert rates(folder / "empty")[0] == 0.0
    assert rates(folder / "full") == [1.0, 1.0, 1.0]
    assert rates(folder / "adapted")[0] == 0.0
    for rank in range(2):
        assert "set ranks.teacher=replicated, or leave out cache.dir" in (folder / f"refused-{rank}.txt").read_text()


def test_two_ranks_ask_a_judge_what_one_process_asks(one: Path, two: Path) -> None:
    """Each has a record of its own, and no question is in both, also where a prompt comes to the other rank later."""
    whole = exchanges(one / "ropd" / "judge.jsonl")
    mine, other = (exchanges(two / "ropd" / name) for name in ("judge.jsonl", "judge-rank-1.jsonl"))
    assert mine and other and mine | other == whole and not mine.keys() & other.keys()
    steps = [{step for step, _ in own.values()} for own in (mine, other)]
    assert steps == [{1, 2, 3}, {1, 2, 3}]


def exchanges(path: Path) -> dict[str, tuple[int, str]]:
    """Step and answer by question; the digests in the record depend on the server's address."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    asked = {json.dumps([row[name] for name in ("messages", "seed", "purpose")]): row for row in found}
    assert len(asked) == len(found)
    return {question: (row["step"], row["text"]) for question, row in asked.items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock and on the cache."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    other = ("time/", "tokens_per", "teacher_cache")
    return [{key: value for key, value in row.items() if not key.startswith(other)} for row in found]


def rates(folder: Path) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["teacher_cache/hit_rate"] for row in found]


def test_contracts_hold_where_ranks_divide_the_work(tmp_path: Path) -> None:
    """The contract tests of teachers, engines and graders, each of them divided over two ranks, see `contracts.py`."""
    words = command(2, str(HERE / "contracts.py"), str(tmp_path))
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = {(tmp_path / f"passed-{rank}").read_text() for rank in (0, 1)}
    assert len(passed) == 1
    assert int(passed.pop()) > 100, "most of them were not run"


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    words = command(2, "-m", "retort", "train", "rollout.prompts=1", f"--out={tmp_path / 'run'}", "device=cpu")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("retort: ")]
    assert len(said) == 1
    assert said[0].startswith("retort: a batch of 1 prompts is less than one for each of 2 ranks")
    assert not (tmp_path / "run").exists()
