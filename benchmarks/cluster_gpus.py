"""Stage times of GPUs that nobody here has: from sizes of models, published rates, and assumptions that say so.

A decode step reads all weights once, and the keys and values of every sequence. Reading a prompt, scoring and learning
are products: 2 operations a weight and token, 6 where gradients are formed. Shares of the rates on paper that are
reached, and everything else marked so in `ASSUMED`, are assumptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster_model import Affine, Decode, Layout, Load, Outcome, Stages, lognormal
from cluster_sim import simulate


@dataclass(frozen=True)
class Gpu:
    """Rates on paper: bytes a second from memory, operations a second in bf16, bytes of memory."""

    name: str
    bandwidth: float
    operations: float
    memory: float


@dataclass(frozen=True)
class Model:
    """A decoder: its weights, those that a token uses, and bytes of keys and values of a token, in bf16."""

    name: str
    weights: float
    used: float
    cache: float


H100 = Gpu("H100", 3.35e12, 989e12, 80e9)
H200 = Gpu("H200", 4.8e12, 989e12, 141e9)
B200 = Gpu("B200", 8.0e12, 2250e12, 180e9)


def _cache(layers: int, groups: int, each: int) -> float:
    return 2.0 * 2 * layers * groups * each


STUDENT = Model("Qwen3-8B", 8.2e9, 8.2e9, _cache(36, 8, 128))
TEACHER = Model("Qwen3-32B", 32.8e9, 32.8e9, _cache(64, 8, 128))
SPARSE = Model("Qwen3-Coder-30B-A3B", 30.5e9, 3.3e9, _cache(48, 4, 128))

#: What is assumed, by name, with the words of the page.
ASSUMED = {
    "memory": (0.8, "share of the memory's rate that decoding reaches"),
    "products": (0.4, "share of the operations' rate that scoring and reading prompts reach"),
    "learning": (0.35, "share of it that learning reaches"),
    "overhead": (0.001, "seconds of a decode step besides reading"),
    "link": (25e9, "bytes a second between machines, for each that generates"),
    "handing": (1.0, "seconds to hand out weights, and again to take them, besides the bytes"),
    "request": (0.01, "seconds of a request to a teacher besides its products"),
    "step": (1.0, "seconds of a step besides its stages"),
}


def assumed(name: str) -> float:
    """A number of `ASSUMED`."""
    return ASSUMED[name][0]


def decode(gpu: Gpu, model: Model, weight_bytes: float = 2.0) -> Decode:
    """Of one GPU that generates; weights in fewer bits are read faster."""
    read = gpu.bandwidth * assumed("memory")
    product = 2 * model.used / (gpu.operations * assumed("products") * 2 / weight_bytes)
    return Decode(
        prompt=product,
        step=assumed("overhead") + model.weights * weight_bytes / read,
        row=product,
        context=model.cache / read,
    )


def stages(gpu: Gpu, student: Model, teacher: Model) -> Stages:
    """Of a layout of such GPUs, one for each process."""
    scores = 2 * teacher.used / (gpu.operations * assumed("products"))
    # A pass without gradient for the statistics of the batch, and one with.
    learns = 8 * student.used / (gpu.operations * assumed("learning"))
    moved = assumed("handing") + 2 * student.weights / assumed("link")
    return Stages(
        decode=decode(gpu, student),
        teacher=Affine(assumed("request"), scores),
        learn=Affine(0.0, learns),
        besides=Affine(assumed("step")),
        keep=assumed("handing"),
        update=moved,
    )


@dataclass(frozen=True)
class Work:
    """What eight GPUs do in a step: trajectories, completions of a prompt, its tokens, and lengths in tokens."""

    rollouts: int = 128
    samples: int = 4
    prompt: int = 300
    mean: float = 2200.0
    longest: int = 16_384
    sigma: float = 0.9

    def load(self, times: int = 1) -> Load:
        """A batch so many times as large."""
        lengths = lognormal(self.mean, self.sigma, self.longest)
        return Load(times * self.rollouts // self.samples, self.samples, self.prompt, lengths)


#: Of eight GPUs: those that learn, that generate, and that hold the teacher.
EIGHT = (3, 4, 1)
SIZES = (8, 64, 512)
STALENESS = range(5)


#: Spreads of lengths (standard deviation of their logarithm) between which the published run is predicted.
SPREADS = (0.6, 0.9)


def one_run(gpus: int, staleness: int, *, together: bool = True) -> Outcome:
    """One run on so many H200, with a batch that grows as they do."""
    times, (ranks, generators, teachers) = gpus // 8, EIGHT
    own = Layout(ranks * times, generators * times, 64, teachers * times, 1, staleness, "group", together=together)
    return simulate(own, stages(H200, STUDENT, TEACHER), Work().load(times), steps=_steps(gpus) + 2 * staleness, seed=1)


def several_runs(runs: int, teachers: int, teacher: Model) -> Outcome:
    """Runs of three H200 that learn and four that generate each, one step ahead, which share so many teachers."""
    ranks, generators, _ = EIGHT
    layout = Layout(ranks, generators, 64, teachers, runs, 1, "group")
    return simulate(layout, stages(H200, STUDENT, teacher), Work().load(), steps=30 if runs <= 8 else 8, seed=1)


def _steps(gpus: int) -> int:
    """Steps that are simulated: fewer of large batches, whose lengths vary less from step to step."""
    return max(6, 48 // math.isqrt(max(1, gpus // 8)))


def published(teacher: Model, sigma: float) -> Outcome:
    """Eight B200 with two of them for teachers, as published; that four generate and two learn is assumed."""
    layout = Layout(ranks=2, generators=4, teachers=2, parallel=64, ask="group")
    return simulate(layout, stages(B200, STUDENT, teacher), Work(samples=1, sigma=sigma).load(), steps=60, seed=1)


def decode_rate(users: int, prompt: int, completion: int) -> float:
    """Tokens a second of Qwen3-8B in 8 bits on an H100, so many sequences at once, half of each written."""
    own = decode(H100, STUDENT, weight_bytes=1.0)
    # A new prompt is read for every completion that ends.
    prompts = own.prompt * users * prompt / completion
    return users / (own.step + own.row * users + own.context * users * (prompt + completion / 2) + prompts)


#: Sequences at once, tokens of a prompt and of a completion, and the tokens a second that were published.
RATES = ((472, 128, 1024, 15_103), (52, 2048, 2048, 3_653), (108, 1024, 128, 4_129))


def row(found: Outcome) -> dict[str, Any]:
    """An outcome as it is written down; its staleness is a histogram."""
    return {("histogram" if name == "staleness" else name): value for name, value in asdict(found).items()}


def predictions() -> dict[str, Any]:
    """All that the page shows of GPUs; some minutes, most of them for 512."""
    runs = [
        {
            "gpus": gpus,
            "staleness": staleness,
            "together": together,
            **row(one_run(gpus, staleness, together=together)),
        }
        for gpus in SIZES
        for together in (True, False)
        for staleness in STALENESS
        if together or staleness
    ]
    shared = [
        {"runs": runs, "teachers": teachers, "teacher": teacher.name, **row(several_runs(runs, teachers, teacher))}
        for teacher in (TEACHER, SPARSE)
        for runs, teachers in ((8, 8), (8, 4), (8, 2), (8, 1), (64, 64), (64, 16), (64, 8))
    ]
    found = [
        {"teacher": teacher.name, "sigma": sigma, **row(published(teacher, sigma))}
        for teacher in (TEACHER, SPARSE)
        for sigma in SPREADS
    ]
    return {"runs": runs, "shared": shared, "published": found}


def keep(found: Mapping[str, Any], path: Path) -> None:
    """Writes predictions into the file of results; what else is there stays."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, "gpus": found}, indent=1) + "\n", encoding="utf-8")
