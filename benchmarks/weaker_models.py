"""Smaller or younger models of the built-in task, for methods that compose teachers of several models.

    python benchmarks/weaker_models.py --out runs/lab-beyond/models    # what is missing; some 20 minutes, one thread

`teacher_base` is the built-in teacher's own training (initial weights, data, shape), ended after a tenth of its steps:
a model that shares with the teacher all that it has learnt before. `weak` and `weaker` are one small model, the second
an early state of the first: a pair that differs by further training. `weak` is smaller than the student before a run,
and solves more (48.8 % after 25.5): it is weak beside the teacher only. `halfway` lies between the two in steps, and
below the student: with `weaker` it is a pair of which both are worse than the student.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retort.tasks.countdown import build
from retort.tasks.countdown.tokenizer import build_tokenizer

#: Layers and widths of the pair: a sixth of the student's parameters.
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 192}


@dataclass(frozen=True)
class Weaker:
    """One model: its shape, how it is trained, and what its card says."""

    shape: Mapping[str, int]
    recipe: build.Recipe
    how: str


MODELS = {
    "teacher_base": Weaker(
        build.SHAPE,
        replace(build.TEACHER, steps=450, bf16=False),
        "The first weights, the data and the shape of the built-in teacher, with a tenth of its steps.",
    ),
    "weaker": Weaker(SMALL, build.Recipe(steps=500, bf16=False, seed=2), "A small model after few steps."),
    "halfway": Weaker(
        SMALL, build.Recipe(steps=700, bf16=False, seed=2), "The same small model after some more steps."
    ),
    "weak": Weaker(SMALL, build.Recipe(steps=2000, bf16=False, seed=2), "The same small model after more steps."),
}


def make(out: Path) -> None:
    """Trains and saves those of the models that are not there, each under its name."""
    tokenizer = build_tokenizer()
    for name, own in MODELS.items():
        if (out / name / "README.md").exists():
            continue
        print(name, flush=True)
        model = build.build_model(tokenizer, own.shape, own.recipe.seed)
        build.train(model, tokenizer, own.recipe)
        build.export(name, model, own.how, out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    torch.set_num_threads(1)
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
