"""Methods that compare images, where a test's models read text alone, and prompts with images."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_models import make_image_model
from PIL import Image

from retort import registry
from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Prompt
from retort.teachers.view import View
from retort.teachers.views import clean


def reads_images(name: str) -> bool:
    """Whether a view of the method shows images, so that data without any are refused."""
    return any(view.images is not None for view in registry.load(name).views.values())


@contextlib.contextmanager
def as_text() -> Iterator[None]:
    """Within, a view that shows a poorer image shows the column `clean` instead: another prompt of the same row.

    What a run does with such a method is then tried on models of text, as with any other: the passes of teachers,
    statistics, weights, packs and micro-batches know nothing of images.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retort.methods.va_opd.pixelated", _clean)
        yield


def _clean(ratio: float) -> View:
    return clean(model="teacher")


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> PromptImage:
    """A gradient with a bright corner, different for each seed."""
    made = Image.linear_gradient("L").resize(size).convert("RGB")
    made.paste((255, (40 * seed) % 256, 0), (seed % size[0], 0, size[0], size[1] // 2))
    return PromptImage.of(made)


def asked(text: str = "which colour ?", *, images: int = 1, more: int = 0) -> Prompt:
    """A prompt with images before its text, and further ones for a teacher alone."""
    own = tuple(picture(seed) for seed in range(images))
    turn = Message("user", f"{PLACEHOLDER * images}{text}", images=own)
    teacher = tuple(picture(100 + seed) for seed in range(more))
    return dataclasses.replace(Prompt("1", (turn,), plain=False), teacher_images=teacher)


def seeing(folder: Path, rows: int = 5) -> None:
    """Two random models that read images, `student` and `teacher`, and `data.jsonl`.

    Its rows have one image or two, one for a teacher alone, an answer and a hint.
    """
    folder.mkdir(exist_ok=True)
    for seed in range(rows + 1):
        (folder / f"{seed}.png").write_bytes(picture(seed).encoded())
    lines = [
        {
            "prompt": f"colour {place} ?",
            "images": [f"{place}.png", f"{place + 1}.png"][: 1 + place % 2],
            "teacher_images": [f"{rows - place}.png"],
            "answer": "red",
            "hint": "warm",
            "solution": "It is red.",
            "demonstration": "It is red.",
            "response": "It is red.",
            "wrong": "It is blue.",
            "clean": f"colour {place} ?",
        }
        for place in range(rows)
    ]
    for seed, name in enumerate(("student", "teacher")):
        (folder / name).mkdir()
        make_image_model(folder / name, "llava", seed=seed)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
