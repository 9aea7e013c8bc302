"""What a look one token ahead costs a teacher, beside the scores of the same completions without it.

    python benchmarks/lookahead.py

Random weights, because the cost does not depend on them: a Llama-style model, four completions
of a short prompt, of which a share of the tokens is looked at after k candidates. Time is that of the processor, on one
thread, the least of three, so that other work on the machine counts little.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retort.advantages.lookahead import lookahead_need
from retort.align.pair import SameIds
from retort.core.needs import SAMPLED
from retort.core.rollouts import Group, Message, Pack, Prompt, Rollout, in_groups
from retort.models.load import load_model
from retort.tasks.countdown.tokenizer import build_tokenizer
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View

ROLLOUTS, K = 4, 8


def teacher(folder: Path) -> LocalTeacher:
    """A model of 8M parameters with the tokenizer of the built-in task."""
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    return LocalTeacher(lm, alignment=SameIds(lm.head().width), batch_tokens=8192)


def completions(one: LocalTeacher, length: int) -> list[Group]:
    """Rollouts of random tokens, which all follow one prompt."""
    draw, vocab = torch.Generator().manual_seed(0), one.alignment.vocab
    prompt = Prompt("a", (Message("user", "45 from 3 5 12 :"),))
    begun = one.render(prompt)

    def rollout(member: int) -> Rollout:
        ids = torch.randint(5, vocab, (length,), generator=draw).tolist()
        return Rollout(prompt, (begun.then(ids, decided=True),), member=member)

    return in_groups([rollout(member) for member in range(ROLLOUTS)])


def seconds(one: LocalTeacher, groups: list[Group], request: ScoreRequest) -> float:
    """Of the processor, the least of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        one.score(groups, request)
        found.append(time.process_time() - start)
    return min(found)


def rows(lengths: list[int], shares: list[float]) -> list[list[Any]]:
    """Length, share, seconds without and with, their ratio, and the tokens that are computed more."""
    with tempfile.TemporaryDirectory() as folder:
        one = teacher(Path(folder))
    found: list[list[Any]] = []
    for length in lengths:
        groups = completions(one, length)
        steps = len(Pack.of([own for group in groups for own in group]))
        draw = torch.Generator().manual_seed(1)
        ids_NK = torch.rand(steps, one.alignment.vocab, generator=draw).topk(K).indices
        plain = seconds(one, groups, ScoreRequest(View(), frozenset({SAMPLED})))
        for share in shares:
            chosen_N = torch.rand(steps, generator=draw) < share
            needs = frozenset({SAMPLED, lookahead_need(K, 0.0)})
            own = seconds(one, groups, ScoreRequest(View(), needs, 1.0, ids_NK, chosen_N))
            found.append([length, f"{share:.0%}", f"{plain:.2f}", f"{own:.2f}", f"{own / plain:.1f}"])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(measure.in_words(measure.machine("cpu", 1)))
    header = ["tokens of a completion", "looked at", "seconds without", "seconds with", "times"]
    print(measure.markdown(header, rows(arguments.lengths, arguments.shares)))


if __name__ == "__main__":
    main()
