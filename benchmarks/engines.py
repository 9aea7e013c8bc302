"""Who writes how fast: the loop in this process beside vLLM in its own, on completions of equal and of ragged lengths.

    python benchmarks/engines.py --vllm PYTHON          # an interpreter that has vLLM; `make engines` makes one
    python benchmarks/engines.py --vllm PYTHON --only countdown --rounds 3

Both take turns in one run, so whatever else the machine does hits both alike: read the ratios. Equal: every completion
has all the tokens; ragged: as many as an exponential distribution gives, with a quarter of the mean. A sync is writing
the weights, having vLLM read them, and scoring the probe on both sides. The noise floor is the mean size of the
difference of both sides' log-probs of the probe's tokens; equal completions are those at temperature 0.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import large_vocabulary
import measure
import torch

from retort.align.stops import StopTokens
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.rollout.engines.base import Engine, Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.vllm import VLLMEngine, VLLMSettings
from retort.tasks import countdown

#: Completions asked for at once, and tokens of a prompt.
COUNT, PROMPT = 64, 12
#: Of each model: the longest completion, ids, width and layers of a random one.
MODELS: dict[str, tuple[int, int, tuple[int, int]]] = {
    "countdown": (48, 266, (0, 0)),
    "random": (128, 16_384, (384, 6)),
    "large": (64, 151_936, (128, 2)),
}


def loaded(name: str, folder: Path) -> LanguageModel:
    """A model whose completions end at their length alone."""
    _, vocab, shape = MODELS[name]
    path = countdown.student_path() if name == "countdown" else folder / "student"
    if name != "countdown":
        large_vocabulary.build_pair(folder, vocab=vocab, shapes={"student": shape})
    lm = load_model(str(path), role="student", precision="fp32", device=torch.device("cpu"))
    lm.stops = StopTokens(frozenset({0}), 0)
    return lm


def requests(longest: int, *, ragged: bool) -> list[Request]:
    """Requests for completions of equal or of ragged lengths."""
    draws = uniforms(0, "rollouts", "lengths", count=COUNT).tolist()
    rooms = [min(longest, 1 + int(-math.log1p(-u) * longest / 4)) if ragged else longest for u in draws]
    contexts = [TokenSequence.of([2 + (31 * row + 7 * place) % 200 for place in range(PROMPT)]) for row in range(COUNT)]
    return [Request(own, uniforms(0, "rollouts", n, count=rooms[n])) for n, own in enumerate(contexts)]


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def greedy_share(own: Engine, other: Engine, asked: list[Request], longest: int) -> float:
    """The share of equal completions at temperature 0."""
    one, two = own.generate(asked, Sampling(longest, 1e-6)), other.generate(asked, Sampling(longest, 0.0))
    return sum(mine.ids == theirs.ids for mine, theirs in zip(one, two, strict=True)) / len(one)


def measured(name: str, folder: Path, python: str, rounds: int) -> list[list[object]]:
    """Rows of the table for a model."""
    longest, vocab, _ = MODELS[name]
    lm = loaded(name, folder)
    vocab = min(vocab, lm.rows)
    own = HFEngine(lm, vocab=vocab, max_parallel=256)
    probe = [request.context for request in requests(longest, ragged=False)[:8]]
    other = VLLMEngine(lm, vocab, VLLMSettings(python, longest=PROMPT + longest), probe=probe)
    other.open(folder / "engine")
    starts = timed(lambda: other.update(0))
    measure.progress(f"{name}: vLLM has started after {starts:.0f} s")
    rows: list[list[object]] = []
    try:
        syncs = [timed(lambda number=number: other.update(number)) for number in range(1, 4)]
        share = greedy_share(own, other, requests(longest, ragged=False), longest)
        for ragged in (False, True):
            asked, sampling = requests(longest, ragged=ragged), Sampling(longest)
            written = sum(len(found.ids) for found in other.generate(asked, sampling))
            own.generate(asked, sampling)
            seconds: list[tuple[float, float]] = []
            for _ in range(rounds):
                both = (timed(partial(own.generate, asked, sampling)), timed(partial(other.generate, asked, sampling)))
                seconds.append(both)
                measure.progress(
                    f"{name}, {'ragged' if ragged else 'equal'}: own {both[0]:.2f} s, vLLM {both[1]:.2f} s"
                )
            ratios = sorted(theirs / mine for mine, theirs in seconds)
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            best = [written / min(side) for side in zip(*seconds, strict=True)]
            label = f"{name}, {lm.parameters / 1e6:.1f}M, {vocab:,} ids"
            lengths = f"ragged, {written / COUNT:.0f} of {longest}" if ragged else f"equal, {longest}"
            rows.append([label, lengths, *best, ratio, min(syncs), other.noise_floor, f"{share:.0%}"])
    finally:
        other.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="an interpreter that has vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(MODELS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for name in [given.only] if given.only else list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(name, Path(folder), given.vllm, given.rounds)
    print(measure.in_words(measure.machine("cpu", 1)))
    header = [
        *("model", "completions, tokens", "own, tokens/s", "vLLM, tokens/s", "time of vLLM / own"),
        *("sync, s", "noise floor, nats", "equal at temperature 0"),
    ]
    print(measure.markdown(header, rows))


if __name__ == "__main__":
    main()
