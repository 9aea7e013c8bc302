"""How the bundled models of the task shapes are trained, and the model card that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retort.tasks.shapes.pictures import SIDE
from retort.tasks.shapes.problems import HELD_OUT_ROWS, KINDS, Kind

WIDTH, LAYERS, HEADS = 96, 4, 3
VISION_WIDTH, VISION_LAYERS = 64, 2
SAMPLES = 2
PIXELATED = 0.1  # the ratio of the pictures that the card calls pixelated


@dataclass(frozen=True)
class Recipe:
    """One stage of supervised learning.

    Attributes:
        steps: Optimizer steps.
        batch: Problems per step.
        lr: Highest learning rate; a cosine decays it to zero.
        kinds: The kinds of questions; one that is given twice is twice as frequent.
        right: How often the picture is the problem's own.
        followed: How often the response answers what the note suggests, whatever the picture shows.
        openings: Weights of `OPENINGS`.
        described: How often, in the first third of the steps, the response describes the whole picture instead.
        hinted: How often a section stands before the question.
        blurred: How often the picture is a pixelated one.
        shaded: How often what is asked for is shaded in it.
        seed: Seed of new weights and data.
    """

    steps: int
    batch: int = 32
    lr: float = 2e-3
    kinds: tuple[Kind, ...] = KINDS
    right: float = 1.0
    followed: float = 0.0
    openings: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    described: float = 0.0
    hinted: float = 0.1
    blurred: float = 0.0
    shaded: float = 0.0
    seed: int = 0


#: The hard kinds three times as often as the easy one.
HARD: tuple[Kind, ...] = (*KINDS[:3] * 3, "tallest")
TEACHER = (
    Recipe(steps=3_000, described=0.5, blurred=0.1, shaded=0.1),
    Recipe(steps=1_500, lr=1.5e-3, kinds=HARD, described=0.5, blurred=0.05, shaded=0.05, seed=1),
)
STUDENT = Recipe(steps=200, lr=1e-3, right=0.6, followed=0.9, openings=(0.1, 0.1, 0.2, 0.6), seed=2)


@dataclass(frozen=True)
class Score:
    """Shares over held-out problems, sampled at temperature 1.

    Attributes:
        right: Right answers.
        noted: Answers that the note suggests.
        pixelated: Right answers with pixelated pictures.
        changed: Answers that are another one with the pixelated picture; the words of both are the likeliest ones.
    """

    right: float
    noted: float
    pixelated: float
    changed: float


def described(recipe: Recipe) -> str:
    """What a stage learnt from, in sentences of the model card."""
    pictures = (
        "the problem's own picture"
        if recipe.right == 1
        else f"the problem's own picture in {recipe.right:.0%}, and else that of another problem with the same question"
    )
    which = f"responses, {recipe.followed:.0%} of which follow the note," if recipe.followed else "right responses"
    often = "; the hard kinds of questions three times as often as the easy one" if recipe.kinds == HARD else ""
    first = (
        f" In the first third, {recipe.described:.0%} of the responses described the picture."
        if recipe.described
        else ""
    )
    return (
        f"By supervised learning on {which} beside {pictures}{often}: {recipe.steps:,} steps of {recipe.batch} "
        f"problems, AdamW with a cosine from {recipe.lr:g}, weight decay 0.05, seed {recipe.seed}. A section with a "
        f"hint or a solution stood before {recipe.hinted:.0%} of the questions, {recipe.blurred:.0%} of the pictures "
        f"were pixelated, and what was asked for was shaded in {recipe.shaded:.0%}.{first}"
    )


def card(name: str, start: str, stages: Sequence[Recipe], score: Score, parameters: int) -> str:
    """The model card, Markdown with the metadata block of the Hugging Face hub."""
    made = "\n".join(f"{number}. {described(stage)}" for number, stage in enumerate(stages, 1))
    small = int(SIDE * PIXELATED)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, on-policy-distillation]
---

# Shapes {name}

A LLaVA-style model of {parameters:,} parameters that answers questions about pictures of {SIDE} times {SIDE} pixels,
such as `a triangle is often red . what colour is the triangle ?`. It is the {name} of Retort's built-in visual task,
and good for nothing else.

| on {HELD_OUT_ROWS} held-out problems, {SAMPLES} samples each, temperature 1 | |
|---|---|
| right | {score.right:.1%} |
| right, with pictures pixelated to {small} times {small} pixels | {score.pixelated:.1%} |
| the answer is what the note suggests | {score.noted:.1%} |
| the likeliest answer is another one when the picture is pixelated | {score.changed:.1%} |

## How it was made

A Llama-style text model of {LAYERS} layers of width {WIDTH}, and a CLIP-style vision tower of {VISION_LAYERS} layers of
width {VISION_WIDTH}, from {start}:

{made}

No held-out problem occurs in the training data. The weights are stored in bfloat16; the scores are those of the stored
weights, loaded again into float32.

    python -m retort.tasks.shapes.build --out models

Licence: Apache-2.0. The data are generated, so nothing else is in it.
"""
