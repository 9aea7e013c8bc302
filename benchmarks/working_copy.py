"""Casts per token of a student that writes in bf16, and the time of it: with its working copy, and by autocast alone.

    python benchmarks/working_copy.py                   # Qwen3's vocabulary and a small pair's width: a minute
    python benchmarks/working_copy.py --vocab 4096 --width 128 --layers 2 --tokens 8

The same answers by three: bf16 with the copy, bf16 by autocast alone (what a token cost before there was one), fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import large_vocabulary
import measure
import torch
from torch.profiler import ProfilerActivity, profile

from retort.align.stops import StopTokens
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel, Precision
from retort.models.load import load_model
from retort.models.working import WorkingCopy
from retort.rollout.engines.hf import HFEngine, Request, Sampling


class Without(WorkingCopy):
    """No copies: autocast casts what it multiplies by."""

    @contextlib.contextmanager
    def in_place(self, model: Any, probe: Callable[[], Any]) -> Iterator[None]:
        yield


def write(lm: LanguageModel, rows: int, tokens: int) -> list[list[int]]:
    """Answers that nobody ends early."""
    vocab = lm.head().width
    lm.stops = StopTokens(frozenset({vocab - 1}), vocab - 1)
    engine = HFEngine(lm, vocab=vocab - 1, max_parallel=rows)
    engine.loops = True  # its trial is no part of what is measured
    asked = [Request(TokenSequence.of([5 + n, 9, 12]), uniforms(0, "rollouts", n, count=tokens)) for n in range(rows)]
    return [found.ids for found in engine.generate(asked, Sampling(tokens))]


def measured(lm: LanguageModel, rows: int, tokens: int) -> tuple[float, float, list[list[int]]]:
    """Copies per token, seconds, and the answers."""
    write(lm, rows, 2)
    start = time.perf_counter()
    found = write(lm, rows, tokens)
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        write(lm, rows, 4)
    copies = sum(event.count for event in seen.key_averages() if event.key == "aten::copy_")
    return copies / 4, seconds, found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", type=int, default=large_vocabulary.VOCAB)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"student": (given.width, given.layers)}
        large_vocabulary.build_pair(Path(folder), vocab=given.vocab, shapes=shape)
        lines, answers = [], []
        sides: dict[str, tuple[Precision, WorkingCopy]] = {
            "bf16, working copy": ("bf16", WorkingCopy()),
            "bf16, autocast alone": ("bf16", Without()),
            "fp32": ("fp32", WorkingCopy()),
        }
        path, device = str(Path(folder) / "student"), torch.device(given.device)
        for name, (precision, copy) in sides.items():
            lm = load_model(path, role="student", precision=precision, device=device)
            lm.working = copy
            copies, seconds, found = measured(lm, given.rows, given.tokens)
            answers.append(found)
            lines.append([name, copies, seconds])
    print(measure.in_words(measure.machine(given.device, torch.get_num_threads())), "")
    print(measure.markdown(["", "copies a token", f"s for {given.rows} x {given.tokens} tokens"], lines))
    print("\nbf16 with the copy and without: " + ("the same ids" if answers[0] == answers[1] else "OTHER IDS"))


if __name__ == "__main__":
    main()
