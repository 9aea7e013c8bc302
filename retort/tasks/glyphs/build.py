"""Make the bundled student and experts of the task glyphs from nothing.

    python -m retort.tasks.glyphs.build --out models

saves ``student/``, ``glyph/`` and ``color/``, each with a model card that holds the numbers measured in this very run.
All learn by flow matching on pictures that are drawn for their prompts. First, the pictures show what is asked for. The
student then goes on with pictures of which many show another character or another colour, so that it is mediocre at
both. Each expert goes on from the student, with pictures in which one of the two follows the prompt always, and the
other one seldom; the position always does. (Experts of Flow-OPD come from reinforcement learning; here the pictures are
known.) All have one architecture and one ancestor, so that the mean of the experts' weights is a model, too.
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
from retort.tasks.glyphs.pictures import COLORS, FONT, POSITIONS, SIDE, pictures, random_marks
from retort.tasks.glyphs.problems import DOMAINS, WORDS, Asked, Domain, combinations
from retort.tasks.glyphs.readers import color_N, glyph_N
from retort.tasks.matching import Batch, Fit, fit, sampled

CONFIG = SmallConfig(latent_shape=(3, SIDE, SIDE), words=WORDS, patch=6, width=128, layers=3, heads=4)
#: Samples of each held-out combination that a model card counts, in each wording.
SAMPLES = 4

# Axes: N samples.


@dataclass(frozen=True)
class Stage:
    """One stage of learning.

    Attributes:
        glyph: How often the character of a picture is the prompt's; else it is a random one.
        color: How often its colour is.
        how: The optimizer's part.
    """

    glyph: float
    color: float
    how: Fit


@dataclass(frozen=True)
class Score:
    """Shares of held-out samples.

    Attributes:
        glyph: That show the asked character.
        color: That have the asked colour.
    """

    glyph: float
    color: float


STUDENT = (
    Stage(1.0, 1.0, Fit(steps=1600)),
    Stage(0.45, 0.45, Fit(steps=200, lr=5e-4, seed=1)),
)
EXPERTS: Mapping[Domain, Stage] = {
    "glyph": Stage(1.0, 0.25, Fit(steps=600, lr=7e-4, seed=2)),
    "color": Stage(0.25, 1.0, Fit(steps=600, lr=7e-4, seed=3)),
}


def indices(asked: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of characters, colours and positions, [N] each."""
    columns = [(one.glyph, one.color, one.position) for one in asked]
    tables = [list(names) for names in (FONT, COLORS, POSITIONS)]
    every = torch.tensor([[table.index(name) for table, name in zip(tables, row, strict=True)] for row in columns])
    return every[:, 0], every[:, 1], every[:, 2]


def training(stage: Stage) -> Batch:
    """Batches of a stage: latents of pictures, and training prompts in both wordings."""
    asked = combinations("train")
    own_glyph, own_color, own_position = indices(asked)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Sequence[str]]:
        row_N = torch.randint(len(asked), (count,), generator=generator)
        domain_N = torch.randint(len(DOMAINS), (count,), generator=generator)
        shown = [
            torch.where(
                torch.rand(count, generator=generator) < follows,
                own[row_N],
                torch.randint(len(names), (count,), generator=generator),
            )
            for own, names, follows in ((own_glyph, FONT, stage.glyph), (own_color, COLORS, stage.color))
        ]
        drawn = pictures(random_marks(shown[0], shown[1], own_position[row_N], generator))
        return 2 * drawn - 1, [
            asked[row].text(DOMAINS[domain]) for row, domain in zip(row_N.tolist(), domain_N.tolist(), strict=True)
        ]

    return draw


def measure(flow: SmallFlow, domain: Domain, samples: int = SAMPLES) -> Score:
    """The scores of a model on held-out prompts of a domain, with the same noise every time."""
    asked = combinations("held_out") * samples
    images = sampled(flow, [one.text(domain) for one in asked])
    glyphs, colors, _ = indices(asked)
    return Score(
        glyph=(glyph_N(images) == glyphs).float().mean().item(),
        color=(color_N(images) == colors).float().mean().item(),
    )


def card(name: str, stages: Sequence[Stage], scores: Mapping[Domain, Score], parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    made = "\n".join(
        f"{number}. {one.how.steps:,} steps of {one.how.batch} pictures, AdamW with a cosine from {one.how.lr:g}, seed "
        f"{one.how.seed}: the character was the prompt's in {one.glyph:.0%} and else random, the colour in "
        f"{one.color:.0%}."
        for number, one in enumerate(stages, 1)
    )
    table = "\n".join(f"| {domain} | {one.glyph:.1%} | {one.color:.1%} |" for domain, one in scores.items())
    what = "student" if name == "student" else f"expert `{name}`"
    held_out = len(combinations("held_out"))
    return f"""---
license: apache-2.0
tags: [flow-matching, on-policy-distillation]
---

# Glyphs: {what}

A flow-matching model of {parameters:,} parameters that paints a character in a colour, {SIDE} times {SIDE} pixels, for
prompts such as `write 'A' in red at the top left`. It is the {what} of Retort's built-in image task, and good for
nothing else.

| {held_out} held-out prompts in a domain's wording, {SAMPLES} samples each | right character | right colour |
|---|---|---|
{table}

## How it was made

By flow matching on pictures that were drawn for the prompts; the position always follows the prompt, and the prompt was
left out in 10 %.

{made}

No held-out combination occurs in the training data. The weights are stored in bfloat16; the scores are those of the
stored weights, opened again in float32.

    python -m retort.tasks.glyphs.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""


def save(name: str, stages: Sequence[Stage], flow: SmallFlow, out: Path) -> None:
    """Save and measure a model, and write its card."""
    folder = out / name
    flow.save(folder, dtype=torch.bfloat16)
    stored = SmallFlow.open(folder)
    scores: dict[Domain, Score] = {domain: measure(stored, domain) for domain in DOMAINS}
    parameters = sum(own.numel() for own in stored.module.parameters())
    (folder / "README.md").write_text(card(name, stages, scores, parameters), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: {scores}, {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled student and experts of the task glyphs.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write student/, glyph/ and color/ into")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums are the same on every machine that has the same instructions
    start, flow = time.monotonic(), SmallFlow.new(CONFIG, arguments.seed)
    for stage in STUDENT:
        fit(flow, training(stage), stage.how.other(arguments.seed), name="student")
    save("student", STUDENT, flow, arguments.out)
    for name, stage in EXPERTS.items():
        expert = SmallFlow.open(arguments.out / "student")
        fit(expert, training(stage), stage.how.other(arguments.seed), name=name)
        save(name, [*STUDENT, stage], expert, arguments.out)
    print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
