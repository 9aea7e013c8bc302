"""Thumbnails of recorded rollouts, and what the records and the report make of them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.report import build_report
from retort.rollout.record import token_row
from retort.train.output.thumbnails import FOLDER, MOST_BYTES, keep, small


def noise(size: tuple[int, int]) -> PromptImage:
    """An image that PNG cannot make small."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=draw, dtype=torch.uint8)
    return PromptImage.of(Image.frombytes("RGB", size, bytes(pixels.flatten().tolist())))


def seen(image: PromptImage, *more: PromptImage) -> Prompt:
    message = Message("user", f"{PLACEHOLDER}What is it?", images=(image,))
    return Prompt("seen", (message,), plain=True, teacher_images=more)


@pytest.mark.parametrize(
    ("size", "shown"), [((600, 300), (256, 128)), ((300, 900), (85, 256)), ((256, 256), (256, 256))]
)
def test_a_large_image_becomes_a_small_file(size: tuple[int, int], shown: tuple[int, int]) -> None:
    kind, content = small(noise(size))
    assert kind == "jpg" and len(content) <= MOST_BYTES and Image.open(io.BytesIO(content)).size == shown


def test_a_tiny_image_stays_sharp() -> None:
    image = Image.new("RGB", (3, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    kind, content = small(PromptImage.of(image))
    found = Image.open(io.BytesIO(content))
    assert (
        kind == "png" and found.size == (126, 84) and set(found.get_flattened_data()) == {(255, 0, 0), (255, 255, 255)}
    )


def test_those_of_recorded_rollouts_are_kept_and_never_replaced(tmp_path: Path) -> None:
    first, second = noise((8, 8)), noise((9, 9))
    prompts = [seen(first, second), seen(noise((10, 10)))]
    keep(tmp_path, [{"prompt_id": "bare"}], prompts)
    assert list(tmp_path.iterdir()) == []
    rollout = Rollout(prompts[0], TokenSequence.of([1]).then([2], decided=True), text="b")
    row = token_row(Pack.of([rollout]), 0, {}, _Letters())
    assert row["prompt"] == "[image]What is it?"
    assert (row["images"], row["teacher_images"]) == ([first.digest], [second.digest])
    keep(tmp_path, [row], prompts)
    files = sorted(path.stem for path in (tmp_path / FOLDER).iterdir())
    assert files == sorted([first.digest, second.digest])
    (tmp_path / FOLDER / f"{first.digest}.png").write_bytes(b"mine")
    keep(tmp_path, [row], prompts)
    assert (tmp_path / FOLDER / f"{first.digest}.png").read_bytes() == b"mine"


class _Letters:
    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join("abcdef"[token] for token in ids)


def run_with_images(folder: Path, images: list[PromptImage], rows: list[dict[str, Any]]) -> Path:
    """The folder of a run whose rollouts were recorded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"student": "s", "teacher": "t", "data": "d", "seed": 0}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    full = [{"step": 1, "prompt_id": "a", "text": "ab", "tokens": ["a", "b"], "columns": {}} | row for row in rows]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in full))
    keep(folder, rows, [seen(image) for image in images])
    return folder


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="rollout-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_report_embeds_those_that_it_shows(tmp_path: Path) -> None:
    image = noise((12, 12))
    rows: list[dict[str, Any]] = [{"prompt": "[image]What?", "images": [image.digest, "0" * 64, "../../secret", 5]}]
    run = run_with_images(tmp_path / "run", [image], rows)
    page = build_report([run], tmp_path / "report.html").read_text()
    data = data_of(page)
    assert list(data["images"]) == [image.digest] and data["training"][0]["images"] == [image.digest, "0" * 64]
    assert "; img-src data:" in page and "secret" not in page
    for content in (b"<svg onload='x'/>", b"\x89PNG\r\n\x1a\n" + b"0" * MOST_BYTES):  # no thumbnail of ours
        (run / FOLDER / f"{image.digest}.png").write_bytes(content)
        assert "images" not in data_of(build_report([run], tmp_path / "report.html").read_text())


def test_a_run_without_images_has_none_of_it(tmp_path: Path) -> None:
    run = run_with_images(tmp_path / "run", [], [{"prompt": "What?"}])
    assert not (run / FOLDER).exists()
    page = build_report([run], tmp_path / "report.html").read_text()
    assert "img-src" not in page and "images" not in data_of(page)
