"""Images that are refused, each in one line that names the row."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoded_images import data_url, encoded
from PIL import Image

from retort.core.images import PLACEHOLDER
from retort.core.rollouts import Prompt
from retort.data import load_prompts, prompts_from_rows
from retort.errors import UserError

RED = encoded()
PART = {"type": "image"}
TEXT = {"type": "text", "text": "What is it?"}


def refused(row: dict[str, Any], **columns: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            prompts_from_rows([{"prompt": "before"}, row], columns=columns)
    message = str(caught.value)
    assert message.startswith("data, row 1") and "\n" not in message
    return message


def turn(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def header(width: int, height: int) -> bytes:
    """A PNG that only claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = chunk(b"IDAT", zlib.compress(b""))
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + pixels + chunk(b"IEND", b"")


def film(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue", "green")]
    return encoded(kind=kind, save_all=True, append_images=frames[1:])


CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty (0 bytes)"),
    "cut": (lambda: encoded(os.urandom(3)[0], (64, 64), mode="L")[:-40], "broken or cut off"),
    "cut JPEG": (lambda: encoded(size=(64, 64), kind="JPEG")[:-40], "broken or cut off"),
    "only a header": (lambda: header(4, 3), "broken or cut off"),
    "no width": (lambda: header(0, 3), "or it is broken"),
    "too large": (lambda: header(10_000, 5_001), "10000 x 5001 pixels; at most 50,000,000 are read: make it smaller"),
    "a warning of Pillow's": (lambda: header(10_000, 10_000), "10000 x 10000 pixels; at most"),
    "a bomb": (lambda: header(100_000, 100_000), "far more than 50,000,000 pixels"),
    "GIF that moves": (lambda: film("GIF"), "has 3 frames"),
    "PNG that moves": (lambda: film("PNG"), "has 3 frames"),
    "WebP that moves": (lambda: film("WEBP"), "has 3 frames"),
    "TIFF of pages": (lambda: film("TIFF"), "has 3 frames"),
    "SVG": (
        lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "it is SVG; save it in one of",
    ),
    "PDF": (lambda: b"%PDF-1.7", "it is PDF"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic", "it is HEIC"),
    "a page": (lambda: b"<!DOCTYPE html><html>404</html>", "a page of HTML"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "text": (lambda: b"no image at all", "format is not known, or it is broken"),
    "32 bits": (lambda: encoded(5.0, kind="TIFF", mode="F"), "pixels of 32 bits (mode F)"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_no_usable_image(tmp_path: Path, name: str) -> None:
    content, said = CONTENTS[name][0](), CONTENTS[name][1]
    assert said in refused({"prompt": "x", "image": content})
    assert said in refused({"prompt": "x", "image": {"bytes": content, "path": None}})
    (tmp_path / "a.png").write_bytes(content)
    message = refused({"prompt": "x", "images": [RED, str(tmp_path / "a.png")]})
    assert said in message and message.startswith(f"data, row 1, 'images', item 1: {tmp_path / 'a.png'}: ")
    assert said in refused(turn(TEXT, {"type": "image_url", "image_url": {"url": data_url(content)}}))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nothing/here.png", "there is no folder"),
        ("here.png", "there is no file"),
        ("", None),
        ("https://example.org/a.png", "https://example.org/a.png is an address, and Retort fetches no images"),
        ("s3://bucket/a.png", "is an address"),
        ("a\0b.png", "NUL character"),
        ("a" * 300, "at most 255 bytes"),
        ("data:image/png;base64,@@@", "is not base64"),
        ("data:image/svg+xml,<svg/>", "data URL without base64"),
        ({"url": "http://example.org/a.png"}, "is an address"),
        ({"colour": "red"}, "holds no image (its keys: colour)"),
        ({"image": ["a.png"]}, "is a list; expected a path"),
        (Image.new("RGB", (0, 3)), "image has 0 x 3 pixels"),
        (Image.new("L", (10_000, 5_001)), "at most 50,000,000 are read"),
        ([["a.png"]], "is a list; expected a path"),
        ([RED, None], "'image', item 1: is NoneType"),
        ([object()], "is an object"),
        (139, "'image': holds an int of which no image is read"),
        ([[[255, 0, 0], [0, 0, 0]]], "'image': holds a list of which no image is read"),
        (float("nan"), None),
        (0, None),
    ],
)
def test_values_that_name_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if said is None:
        assert not prompts_from_rows([{"prompt": "x", "image": value}])[0].images
    else:
        assert said in refused({"prompt": "x", "image": value})


def test_a_folder_and_a_pipe_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("", "pipe.png"):
        assert "is no file" in refused({"prompt": "x", "image": str(tmp_path / name)})


def test_an_image_of_pillow_whose_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(film("GIF"))
    with Image.open(tmp_path / "a.gif") as opened:
        assert "has 3 frames" in refused({"prompt": "x", "image": opened})
    (tmp_path / "b.png").write_bytes(encoded(size=(64, 64)))
    closed = Image.open(tmp_path / "b.png")
    closed.close()
    assert "cannot be read" in refused({"prompt": "x", "image": closed})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "<image> and <image>", "image": RED}, "has 2 placeholders <image> for 1 image"),
        ({"prompt": "<image>", "images": [RED, RED]}, "has 1 placeholder <image> for 2 images"),
        ({"prompt": "<image> what?", "images": []}, "has 1 placeholder <image> for 0 images"),
        ({"prompt": "<image> what?", "image": None}, "has 1 placeholder <image> for 0 images"),
        (turn(TEXT, PART), "message 0, part 1: is a placeholder without an image: the column 'images' has 0"),
        (turn(PART, PART) | {"images": [RED]}, "part 1: is a placeholder without an image"),
        (turn({**PART, "index": 1}) | {"images": [RED]}, "part 0: is a placeholder without an image"),
        (turn(PART, TEXT) | {"images": [RED, RED]}, "1 image of the column 'images' have no placeholder"),
        (turn(TEXT, {**PART, "image": RED}) | {"images": [RED]}, "have no placeholder"),
        (turn(TEXT, {"type": "image_url", "image_url": "https://a/b.png"}), "is an address"),
        (
            turn(TEXT, {"type": "input_audio", "input_audio": {}}),
            "part of type 'input_audio'; parts of text and of images",
        ),
        (turn(TEXT, {"type": "video", "video": "a.mp4"}), "part of type 'video'"),
        (
            {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user")], "images": [RED]},
            "not clear to which of 2 turns of the user the images belong; write <image>",
        ),
        ({"prompt": f"odd {PLACEHOLDER}", "image": RED}, "holds the character U+FFFC"),
        (turn({"type": "text", "text": PLACEHOLDER}, {**PART, "image": RED}), "holds the character U+FFFC"),
        (
            {"messages": [*turn(TEXT)["messages"], {"role": "assistant", "content": [{**PART, "image": RED}]}]},
            "the response holds an image; a response is text alone",
        ),
        (
            {"prompt": "x", "response": [{"role": "assistant", "content": [{**PART, "image": RED}]}]},
            "is an image in 'response'; a response is text alone",
        ),
        ({"prompt": "x", "image": RED, "images": [RED]}, "the columns 'images' and 'image' both hold images"),
        ({"prompt": "x", "image": RED, "clean": "<image><image>"}, "'clean': the text has 2 placeholders"),
        ({"prompt": "x", "teacher_images": [b""]}, "'teacher_images', item 0: is empty"),
    ],
)
def test_images_and_placeholders_must_fit(row: dict[str, Any], said: str) -> None:
    assert said in refused(row)


def test_the_line_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b", "image": "gone.png"}) + "\n")
    with pytest.raises(UserError, match=rf"rows.jsonl, line 2, 'image': there is no file {tmp_path}/gone.png"):
        load_prompts(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("path", ["/etc/hostname", "../../secret.png", "a.png", "link"])
def test_a_data_set_of_the_hub_names_no_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    own, secret = tmp_path / "datasets--owner--name" / "own.png", tmp_path / "secret.png"
    own.parent.mkdir()
    for file in (own, secret):
        file.write_bytes(RED)
    (own.parent / "link").symlink_to(secret)

    def load(path: str) -> list[Prompt]:
        rows = [{"prompt": "x", "image": {"bytes": None, "path": path}}]
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        return load_prompts("owner/name")

    assert load(str(own))[0].images
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "image": str(secret)}))
    assert load_prompts(str(tmp_path / "rows.jsonl"))[0].images  # the user's own file may name it
    with pytest.raises(UserError, match=r"lies outside of the data set|must hold its images itself"):
        load(str(own.parent / "link") if path == "link" else path)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'retort-distill\[vision\]'"):
        prompts_from_rows([{"prompt": "x", "image": RED}])
