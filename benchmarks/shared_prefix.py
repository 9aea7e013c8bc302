"""What it saves that a privileged prompt is computed once for all rollouts of its group: a teacher's scoring pass.

    python benchmarks/shared_prefix.py --rounds 5

Sharing on and off take turns in one process, so whatever else the machine does hits both alike. What is timed is the
pass that gives the hidden states at the answers' tokens; the head behind it costs the same either way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model

BUDGET = 8192


@dataclass(frozen=True, eq=False)
class Case:
    """A model, and groups of rollouts behind what a teacher is shown.

    Attributes:
        name: In the table.
        lm: Who scores.
        prompt, answer: Tokens, the mean of the groups.
        sequences: A prompt and an answer each.
    """

    name: str
    lm: LanguageModel
    prompt: float
    answer: float
    sequences: Sequence[TokenSequence]


def grouped(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> list[TokenSequence]:
    """Each answer of a group behind its prompt."""
    return [
        TokenSequence.of(prompt).then(answer, decided=True)
        for prompt, group in zip(prompts, answers, strict=True)
        for answer in group
    ]


def computed(sequences: Sequence[TokenSequence], *, share: bool) -> int:
    """Tokens that go through the layers."""
    from retort.models.packing import Row

    return len(Row.of(sequences, share=share, device=torch.device("cpu")).tokens_T)


def coached_student(groups: int, samples: int) -> Case:
    """The built-in task's student, as its own teacher with the solution in sight."""
    from retort.align.chat import Renderer
    from retort.config import recipe, resolve
    from retort.core.rollouts import Rollout
    from retort.teachers.templates import templates
    from retort.teachers.view_input import Stage, ViewInput
    from retort.teachers.views import privileged
    from retort.train.models.models import load
    from retort.train.setup.prompts import builtin_prompts

    config = resolve(recipe("coached"))
    lm = load(config, "coached:student", "student")
    render, view = Renderer(lm.tokenizer), privileged("solution")
    assert view.render is not None
    prompts, answers = list[list[int]](), list[list[list[int]]]()
    for prompt in builtin_prompts("coached", "train", groups):
        rollout = Rollout(prompt, (render(prompt),))
        shown = view.render(ViewInput(rollout, (), Stage(templates(config.templates))))
        assert shown is not None
        prompts.append(render(shown).ids)
        own = lm.tokenizer(str(prompt.response), add_special_tokens=False)["input_ids"]
        answers.append([own] * samples)
    sequences = grouped(prompts, answers)
    lengths = sum(map(len, prompts)) / groups, sum(len(group[0]) for group in answers) / groups
    return Case("coached student, with the solution", lm, *lengths, sequences)


def random_model(groups: int, samples: int, prompt: int, answer: int) -> Case:
    """A Llama of 4 layers, 256 wide, with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from retort.tasks import coached

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # loaded as any model is, which wraps its attention
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(coached.student_path()).save_pretrained(folder)
        lm = load_model(folder, role="teacher", precision="fp32", device=torch.device("cpu"))
    ids = torch.randint(4096, (groups, prompt + samples * answer)).tolist()
    prompts = [row[:prompt] for row in ids]
    answers = [[row[prompt + n * answer : prompt + (n + 1) * answer] for n in range(samples)] for row in ids]
    return Case(f"4 layers, 256 wide, prompt {prompt}", lm, prompt, answer, *grouped(prompts, answers))


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def row(case: Case, rounds: int) -> list[Any]:
    """One line of the table: both ways in turn, after one of each that is not counted."""
    lm, seconds, found = case.lm, {True: list[float](), False: list[float]()}, dict[bool, Tensor]()
    if not lm.shared_prefixes:
        raise SystemExit(f"{case.name}: this model cannot share prompts")
    for turn in range(rounds + 1):
        for share in (True, False):
            lm.shared_prefixes = share
            spent, found[share] = timed(lambda: lm.all_hidden(case.sequences, BUDGET))
            if turn:
                seconds[share].append(spent)
    ratios = [off / on for on, off in zip(seconds[True], seconds[False], strict=True)]
    counts = [computed(case.sequences, share=share) for share in (True, False)]
    apart = float((found[True] - found[False]).norm() / found[False].norm())
    middle = {share: measure.median(values) for share, values in seconds.items()}
    lengths = f"{case.prompt:.0f} + {case.answer:.0f}"
    return [
        case.name, lengths, f"{counts[1] / counts[0]:.2f}", middle[True], middle[False],
        f"{measure.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{apart:.0e}",
    ]  # fmt: skip


HEADER = (
    "teacher", "tokens: prompt + answer", "fewer tokens, times", "s, shared", "s, not shared", "as fast (rounds)",
    "relative difference",
)  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8, help="rollouts of a group")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = arguments.samples
    cases = [coached_student(64, samples), random_model(4, samples, 512, 64), random_model(4, samples, 128, 64)]
    rows = [row(case, arguments.rounds) for case in cases]
    table = measure.markdown(HEADER, rows)
    measure.finish(measure.machine("cpu", arguments.threads), {"header": HEADER, "rows": rows}, table, arguments.json)


if __name__ == "__main__":
    main()
