"""Make the bundled student and experts of the task plane from nothing.

    python -m retort.tasks.plane.build --out models

saves ``student/``, ``moons/`` and ``gaussians/``, each with a model card that holds the numbers measured in this very
run. All learn by flow matching. The points of the student are spread widely around the shapes, so that it knows where
they are and little more. Each expert goes on from the student, with sharp points for the shapes of its own domain, and
points as before for those of the other. The mean of the experts' weights is a model, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retort.flows.small import SmallConfig, SmallFlow
from retort.tasks.matching import Batch, Fit, fit, sampled
from retort.tasks.plane.problems import DOMAINS, WORDS, Domain, domain
from retort.tasks.plane.shapes import NEAR, SHAPES, SPREAD, on_shape, points

CONFIG = SmallConfig(latent_shape=(2,), words=WORDS, width=64, layers=3, heads=1)
#: Standard deviation of the points that the student learns from.
WIDE = 0.5
#: Samples of each shape that a model card counts.
SAMPLES = 400


@dataclass(frozen=True)
class Stage:
    """One stage of learning.

    Attributes:
        sharp: The domains whose points are sharp.
        how: The optimizer's part.
    """

    sharp: tuple[Domain, ...]
    how: Fit


STUDENT = Stage((), Fit(steps=800, batch=256, lr=3e-3))
EXPERTS: Mapping[Domain, Stage] = {
    "moons": Stage(("moons",), Fit(steps=1200, batch=256, seed=1)),
    "gaussians": Stage(("gaussians",), Fit(steps=1200, batch=256, seed=2)),
}


def training(stage: Stage) -> Batch:
    """Batches of a stage: points, and the names of their shapes."""
    names = list(SHAPES)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Sequence[str]]:
        which_N = torch.randint(len(names), (count,), generator=generator)
        data = torch.empty(count, 2)
        for index, name in enumerate(names):
            own_N = which_N == index
            spread = SPREAD if domain(name) in stage.sharp else WIDE
            data[own_N] = points(name, int(own_N.sum()), generator, spread)
        return data, [names[index] for index in which_N.tolist()]

    return draw


def measure(flow: SmallFlow, own: Domain, samples: int = SAMPLES) -> float:
    """The share of points on the shape that was asked for, over the shapes of a domain, with the same noise always."""
    names = [name for name in SHAPES if domain(name) == own]
    found = sampled(flow, [name for name in names for _ in range(samples)]).split(samples)
    return sum(on_shape(name, some).float().mean().item() for name, some in zip(names, found, strict=True)) / len(names)


def card(name: str, stages: Sequence[Stage], scores: Mapping[Domain, float], parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    made = "\n".join(
        f"{number}. {one.how.steps:,} steps of {one.how.batch} points, AdamW with a cosine from {one.how.lr:g}, seed "
        f"{one.how.seed}: points were spread by {WIDE:g}"
        + (f", around {', '.join(one.sharp)} by {SPREAD:g}." if one.sharp else ".")
        for number, one in enumerate(stages, 1)
    )
    table = "\n".join(f"| {own} | {share:.1%} |" for own, share in scores.items())
    what = "student" if name == "student" else f"expert `{name}`"
    return f"""---
license: apache-2.0
tags: [flow-matching, on-policy-distillation]
---

# Plane: {what}

A flow-matching model of {parameters:,} parameters that puts points of the plane onto a shape, for prompts such as
`upper moon`. It is the {what} of Retort's built-in task of flows in the plane, and good for nothing else.

| {SAMPLES} points for each shape | at most {NEAR:g} from the shape |
|---|---|
{table}

## How it was made

By flow matching; the prompt was left out in 10 %.

{made}

The weights are stored in bfloat16; the scores are those of the stored weights, opened again in float32.

    python -m retort.tasks.plane.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def save(name: str, stages: Sequence[Stage], flow: SmallFlow, out: Path) -> None:
    """Save and measure a model, and write its card."""
    folder = out / name
    flow.save(folder, dtype=torch.bfloat16)
    stored = SmallFlow.open(folder)
    scores: dict[Domain, float] = {own: measure(stored, own) for own in DOMAINS}
    parameters = sum(own.numel() for own in stored.module.parameters())
    (folder / "README.md").write_text(card(name, stages, scores, parameters), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: {scores}, {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled student and experts of the task plane.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write student/, moons/ and gaussians/ into")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums are the same on every machine that has the same instructions
    start, flow = time.monotonic(), SmallFlow.new(CONFIG, arguments.seed)
    fit(flow, training(STUDENT), STUDENT.how.other(arguments.seed), name="student")
    save("student", [STUDENT], flow, arguments.out)
    for name, stage in EXPERTS.items():
        expert = SmallFlow.open(arguments.out / "student")
        fit(expert, training(stage), stage.how.other(arguments.seed), name=name)
        save(name, [STUDENT, stage], expert, arguments.out)
    print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
