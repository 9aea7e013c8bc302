"""Who writes how fast: the own loop, transformers' continuous batching, and vLLM, on equal and on ragged lengths.

    python benchmarks/engines.py --vllm PYTHON          # an interpreter that has vLLM; `make engines` makes one
    python benchmarks/engines.py --vllm PYTHON --only countdown --rounds 3
    python benchmarks/engines.py                        # without vLLM

They take turns in one run, so whatever else the machine does hits all alike: read the ratios. Equal: every completion
has all the tokens; ragged: as many as an exponential distribution gives, with a quarter of the mean. A sync is writing
the weights, having vLLM read them, and scoring the probe on both sides. The noise floor is the mean size of the
difference of vLLM's log-probs of the probe's tokens from the model's. Equal completions are the share of vLLM's at
temperature 0, and of continuous batching's at temperature 1, where the own loop has the same uniforms.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from retort.rollout.engines.continuous import ContinuousEngine
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.vllm import VLLMEngine, VLLMSettings
from retort.tasks import countdown

#: Tokens of a prompt.
PROMPT = 12
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


def requests(longest: int, count: int, *, ragged: bool) -> list[Request]:
    """Requests for completions of equal or of ragged lengths."""
    draws = uniforms(0, "rollouts", "lengths", count=count).tolist()
    rooms = [min(longest, 1 + int(-math.log1p(-u) * longest / 4)) if ragged else longest for u in draws]
    contexts = [TokenSequence.of([2 + (31 * row + 7 * place) % 200 for place in range(PROMPT)]) for row in range(count)]
    return [Request(own, uniforms(0, "rollouts", n, count=rooms[n])) for n, own in enumerate(contexts)]


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def equal_share(own: Engine, other: Engine, asked: list[Request], sampling: tuple[Sampling, Sampling]) -> str:
    """The share of equal completions of two engines, each with its sampling."""
    one, two = own.generate(asked, sampling[0]), other.generate(asked, sampling[1])
    return f"{sum(mine.ids == theirs.ids for mine, theirs in zip(one, two, strict=True)) / len(one):.0%}"


def spread(ratios: Sequence[float]) -> str:
    """The median of some ratios, and the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def rows_of(
    name: str, lm: LanguageModel, engines: Mapping[str, Engine], count: int, rounds: int
) -> Iterator[list[object]]:
    """Rows of the table of times: for each kind of lengths, of every engine but the first beside the first."""
    longest = MODELS[name][0]
    for ragged in (False, True):
        asked, sampling = requests(longest, count, ragged=ragged), Sampling(longest)
        found = [one.generate(asked, sampling) for one in engines.values()]  # the first call of each is not timed
        written = sum(len(own.ids) for own in found[0])
        seconds: dict[str, list[float]] = {who: [] for who in engines}
        for number in range(rounds):
            for who, one in engines.items():
                seconds[who].append(timed(partial(one.generate, asked, sampling)))
            took = ", ".join(f"{who} {own[-1]:.2f} s" for who, own in seconds.items())
            measure.progress(f"{name}, {'ragged' if ragged else 'equal'}, round {number + 1}: {took}")
        label = f"{name}, {lm.parameters / 1e6:.1f}M, {min(MODELS[name][1], lm.rows):,} ids"
        lengths = f"ragged, {written / count:.0f} of {longest}" if ragged else f"equal, {longest}"
        first, *others = seconds.values()
        ratios = [spread([theirs / mine for mine, theirs in zip(first, own, strict=True)]) for own in others]
        yield [label, lengths, written / min(first), *ratios]


def measured(name: str, folder: Path, python: str | None, count: int, rounds: int) -> tuple[list[list[object]], str]:
    """Rows of the table of times for a model, and a sentence on how far the engines agree."""
    lm = loaded(name, folder)
    longest, vocab = MODELS[name][0], min(MODELS[name][1], lm.rows)
    own = HFEngine(lm, vocab=vocab, max_parallel=256)
    engines: dict[str, Engine] = {"own": own, "continuous": ContinuousEngine(lm, vocab=vocab, max_parallel=256)}
    asked, plain = requests(longest, count, ragged=False), Sampling(longest)
    said = f"{name}: continuous {equal_share(own, engines['continuous'], asked, (plain, plain))} equal"
    if python is None:
        return list(rows_of(name, lm, engines, count, rounds)), said
    other = VLLMEngine(lm, vocab, VLLMSettings(python, longest=PROMPT + longest), probe=[o.context for o in asked[:8]])
    other.open(folder / "engine")
    try:
        starts = timed(lambda: other.update(0))
        measure.progress(f"{name}: vLLM has started after {starts:.0f} s")
        sync = min(timed(lambda number=number: other.update(number)) for number in range(1, 4))
        share = equal_share(own, other, asked, (Sampling(longest, 1e-6), Sampling(longest, 0.0)))
        said += (
            f"; vLLM {share} equal, noise floor {other.noise_floor:.1e} nats, sync {sync:.2f} s, start {starts:.0f} s"
        )
        return list(rows_of(name, lm, {**engines, "vLLM": other}, count, rounds)), said
    finally:
        other.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="an interpreter that has vLLM; without it, vLLM is left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=64, help="completions asked for at once")
    parser.add_argument("--only", choices=list(MODELS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, said = list[list[object]](), list[str]()
    for name in [given.only] if given.only else list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            found, sentence = measured(name, Path(folder), given.vllm, given.count, given.rounds)
            rows, said = rows + found, [*said, sentence]
    print(measure.in_words(measure.machine("cpu", 1)))
    header = ["model", "completions, tokens", "own, tokens/s", "time of continuous / own"]
    print(measure.markdown(header + (["time of vLLM / own"] if given.vllm else []), rows))
    print("\n".join(said))


if __name__ == "__main__":
    main()
