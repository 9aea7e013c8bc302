"""Images of rows, in every shape in which data sets hold them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from encoded_images import data_url, encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retort.core.images import PLACEHOLDER, PromptImage, digest_of
from retort.core.rollouts import Message, Prompt
from retort.data import each_turn, fingerprint, in_template, load_prompts, prompts_from_rows
from retort.errors import UserError
from retort.train.setup.split import content, set_aside

RED, BLUE, GREEN = encoded("red"), encoded("blue", (5, 4)), encoded("green", kind="JPEG")
TEXT = {"type": "text", "text": "What is it?"}


def read(row: dict[str, Any], **columns: str) -> Prompt:
    (prompt,) = prompts_from_rows([row], columns=columns)
    return prompt


def digests(prompt: Prompt | Message) -> list[str]:
    return [image.digest for image in prompt.images]


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def json_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A PNG file of its own."""
    return written(tmp_path / "pictures" / "red.png", RED)


SHAPES = {
    "a path": lambda file: str(file),
    "a pathlib path": lambda file: file,
    "bytes": lambda file: RED,
    "a bytearray": lambda file: bytearray(RED),
    "a data URL": lambda file: data_url(RED),
    "stored bytes": lambda file: {"bytes": RED, "path": None},
    "stored bytes with a name": lambda file: {"bytes": RED, "path": "nowhere.png"},
    "a stored path": lambda file: {"bytes": None, "path": str(file)},
    "stored bytes as JSON": lambda file: {"bytes": base64.b64encode(RED).decode(), "path": None},
    "a url": lambda file: {"url": data_url(RED)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column", ["image", "images", "listed"])
def test_every_shape_of_an_image_is_the_same_image(file: Path, shape: str, column: str) -> None:
    given = SHAPES[shape](file)
    row = {"images": [given]} if column == "listed" else {column: given}
    prompt = read({"prompt": "What is it?", **row})
    assert prompt.text == f"{PLACEHOLDER}What is it?" and prompt.readable == "[image]What is it?"
    assert digests(prompt) == [digest_of(RED)]
    (image,) = prompt.images
    assert image.size == (4, 3) and image.decoded().getpixel((0, 0)) == (255, 0, 0)
    assert isinstance(image.source, Path) == ("path" in shape)


def test_an_image_of_pillow_is_kept_as_it_is_shown() -> None:
    stored = Image.new("RGB", (4, 2), "blue")
    stored.putpixel((0, 0), (255, 0, 0))
    stored.getexif()[0x0112] = 6  # turned by a quarter
    (image,) = read({"prompt": "x", "image": stored}).images
    assert image.size == (2, 4) and image.decoded().getpixel((1, 0)) == (255, 0, 0)


def test_exif_orientation_counts_in_the_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = read({"prompt": "x", "image": encoded(kind="JPEG", exif=exif)}).images
    assert image.size == (3, 4)


@pytest.mark.parametrize(
    ("mode", "color", "kind", "seen"),
    [
        ("P", 0, "PNG", (0, 0, 0)),
        ("P", 0, "GIF", (0, 0, 0)),
        ("L", 7, "PNG", (7, 7, 7)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), "PNG", (255, 255, 255)),
        ("LA", (9, 255), "PNG", (9, 9, 9)),
        ("I;16", 0x8000, "PNG", (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("RGB", "red", "BMP", (255, 0, 0)),
        ("RGB", "red", "PPM", (255, 0, 0)),
    ],
)
def test_modes_and_palettes(mode: str, color: Any, kind: str, seen: tuple[int, int, int]) -> None:
    (image,) = read({"prompt": "x", "image": encoded(color, kind=kind, mode=mode)}).images
    assert image.decoded().getpixel((0, 0)) == seen


def test_a_file_of_json_lines_names_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "data" / "pictures" / "red.png", RED)
    outside = written(tmp_path / "blue.png", BLUE)
    source = json_lines(
        tmp_path / "data" / "rows.jsonl",
        {"prompt": "a", "images": ["pictures/red.png", "../blue.png"]},
        {"prompt": "b", "image": str(outside)},
        {"prompt": "c"},
    )
    monkeypatch.chdir(tmp_path / "data" / "pictures")
    first, second, third = load_prompts(source)
    assert digests(first) == [digest_of(RED), digest_of(BLUE)] and first.text == 2 * PLACEHOLDER + "a"
    assert digests(second) == [digest_of(BLUE)] and second.images[0] is first.images[1]
    assert third.text == "c" and not third.images
    assert digests(read({"prompt": "x", "image": "red.png"})) == [digest_of(RED)]
    monkeypatch.chdir(tmp_path)
    assert first.images[0].decoded().size == (4, 3)


def test_a_table_may_hold_a_list_as_json_text(tmp_path: Path, file: Path) -> None:
    table = written(tmp_path / "rows.csv", b'prompt,images\na,"[""pictures/red.png""]"\nb,pictures/red.png\nc,\n')
    assert [digests(prompt) for prompt in load_prompts(str(table))] == [[digest_of(RED)], [digest_of(RED)], []]


@pytest.mark.parametrize("decode", [True, False])
def test_parquet_and_saved_data_sets_with_images(tmp_path: Path, decode: bool) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    own = datasets.Image(decode=decode)
    made = datasets.Dataset.from_dict(
        {
            "prompt": ["a", "b"],
            "image": [{"bytes": RED, "path": None}, None],
            "images": [[], [{"bytes": GREEN, "path": "green.jpg"}, {"bytes": RED, "path": None}]],
            "answer": ["1", "2"],
        },
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "image": own, "images": datasets.List(own)}
            | {"answer": datasets.Value("string")}
        ),
    )
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for prompts in (load_prompts(str(tmp_path / "rows.parquet")), load_prompts(str(tmp_path / "saved"))):
        # The bytes as they are stored, whether the data set would decode them or not.
        assert [digests(prompt) for prompt in prompts] == [[digest_of(RED)], [digest_of(GREEN), digest_of(RED)]]
    assert fingerprint(prompts_from_rows(made)) == fingerprint(load_prompts(str(tmp_path / "saved")))


def test_parts_in_a_data_set_have_the_keys_of_all(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0, "text": None}]
    turns = [{"role": "user", "content": [*parts, {"type": "text", "index": None, "text": "Same?"}]}]
    rows = [{"messages": turns, "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    (prompt,) = load_prompts(str(tmp_path / "rows.parquet"))
    assert prompt.text == f"{PLACEHOLDER}{PLACEHOLDER}Same?" and digests(prompt) == [digest_of(BLUE), digest_of(RED)]


def test_sounds_of_a_data_set_are_refused_undecoded() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    stored = datasets.Dataset.from_list([{"prompt": "a", "heard": {"bytes": b"RIFF", "path": "a.wav"}}]).data.table
    features = datasets.Features({"prompt": datasets.Value("string"), "heard": datasets.Audio()})
    rows = datasets.Dataset(stored, info=datasets.DatasetInfo(features=features))
    with pytest.raises(UserError, match="'heard' holds an image, a sound or a film"):
        prompts_from_rows(rows)


PARTS = {
    "OpenAI": [TEXT, {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "low"}}],
    "OpenAI, responses": [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": data_url(RED)},
    ],
    "transformers, base64": [TEXT, {"type": "image", "base64": base64.b64encode(RED).decode()}],
    "transformers, url": [TEXT, {"type": "image", "url": data_url(RED)}],
    "Anthropic": [TEXT, {"type": "image", "source": {"type": "base64", "data": base64.b64encode(RED).decode()}}],
}


@pytest.mark.parametrize("writer", PARTS)
def test_parts_that_hold_their_image(writer: str) -> None:
    prompt = read({"messages": [{"role": "user", "content": PARTS[writer]}]})
    assert prompt.text == f"What is it?{PLACEHOLDER}" and digests(prompt) == [digest_of(RED)]
    assert prompt.messages[0].as_dict()["content"] == [TEXT, {"type": "image"}]


@pytest.mark.parametrize("key", ["image", "path"])
def test_parts_that_name_a_file(file: Path, key: str) -> None:
    part = {"type": "image", key: str(file)}
    assert digests(read({"messages": [{"role": "user", "content": [part, TEXT]}]})) == [digest_of(RED)]


def test_placeholders_of_all_turns_are_filled_in_order() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}, TEXT, {"type": "text", "text": "Tell."}]},
        {"role": "assistant", "content": "Red."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
    ]
    prompt = read({"messages": turns, "images": [RED, BLUE]})
    first, _, last = prompt.messages
    assert first.content == f"{PLACEHOLDER}What is it?\nTell." and digests(first) == [digest_of(RED)]
    assert last.content == f"And {PLACEHOLDER}?" and digests(last) == [digest_of(BLUE)]
    assert prompt.images == (*first.images, *last.images)


def test_placeholders_that_people_write_are_filled_in_order() -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "An <image> tag."},
        {"from": "human", "value": "And <image><image>?"},
        {"from": "gpt", "value": "It is <image>."},
    ]
    prompt = read({"conversations": turns, "image": [RED, BLUE, GREEN]})
    assert [message.content for message in prompt.messages] == [
        f"{PLACEHOLDER}\nWhat is it?",
        "An <image> tag.",
        f"And {PLACEHOLDER}{PLACEHOLDER}?",
    ]
    assert digests(prompt.messages[-1]) == [digest_of(BLUE), digest_of(GREEN)]
    assert prompt.response == "It is <image>."


def test_a_text_of_data_without_images_may_hold_what_looks_like_a_placeholder() -> None:
    assert read({"prompt": f"<image> {PLACEHOLDER}"}).messages == (Message("user", f"<image> {PLACEHOLDER}"),)
    turn = {"role": "user", "content": [{"type": "text", "text": "Where is <image>?"}, {"type": "image"}]}
    assert read({"messages": [turn], "images": [RED]}).text == f"Where is <image>?{PLACEHOLDER}"


def test_the_only_turn_of_the_user_has_the_images_of_a_conversation() -> None:
    prompt = read({"messages": [{"role": "user", "content": "What?"}], "system": "Look.", "images": [RED]})
    assert [message.content for message in prompt.messages] == ["Look.", f"{PLACEHOLDER}What?"]


def test_columns_are_mapped_and_teacher_images_are_apart(file: Path) -> None:
    prompt = read(
        {"prompt": "x", "seen": {"picture": RED, "note": "n"}, "boxes": [BLUE, str(file)]},
        images="seen.picture",
        teacher_images="boxes",
    )
    assert digests(prompt) == [digest_of(RED)]
    assert [image.digest for image in prompt.teacher_images] == [digest_of(BLUE), digest_of(RED)]
    assert digests(read({"asked": {"text": "x", "image": RED}}, prompt="asked.text", images="asked.image"))


def test_what_is_read_of_images_is_no_unused_column() -> None:
    notes: list[str] = []
    prompts_from_rows([{"prompt": "x", "image": RED, "teacher_images": BLUE, "more": 1}], notes=notes)
    assert notes == ["data: columns not used: more"]


def test_a_clean_prompt_has_the_images_too() -> None:
    prompt = read({"prompt": "<image> You are an expert. What?", "image": RED, "clean": "What?"})
    assert prompt.clean is not None and prompt.clean[0].images == prompt.images
    assert prompt.clean[0].content == f"{PLACEHOLDER}What?" and prompt.shown("clean") == "[image]What?"
    turns = [{"role": "user", "content": [TEXT, {"type": "image"}]}]
    prompt = read({"prompt": "What?", "image": RED, "clean": turns})
    assert prompt.clean == (Message("user", f"What is it?{PLACEHOLDER}", images=prompt.images),)


def test_each_turn_keeps_its_images() -> None:
    talk = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "<image>And?"},
        {"role": "assistant", "content": "Blue."},
    ]
    prompts = prompts_from_rows([{"messages": talk, "images": [RED, BLUE], "teacher_images": [GREEN]}])
    first, second = each_turn(prompts)
    assert digests(first) == [digest_of(RED)] and digests(second) == [digest_of(RED), digest_of(BLUE)]
    assert (len(first.teacher_images), len(second.teacher_images)) == (0, 1)


def test_a_template_goes_around_images() -> None:
    (prompt,) = in_template([read({"prompt": "What?", "image": RED})], "Look: {prompt}")
    assert prompt.text == f"Look: {PLACEHOLDER}What?" and len(prompt.images) == 1
    with pytest.raises(UserError, match=r"U\+FFFC"):
        in_template([prompt], f"{PLACEHOLDER} {{prompt}}")


def test_images_count_in_fingerprint_and_split_and_only_where_there_are_any() -> None:
    bare, red, blue = ({"prompt": "x"} | more for more in ({}, {"image": RED}, {"image": BLUE}))
    told = {**red, "teacher_images": BLUE}
    assert len({fingerprint([read(row)]) for row in (bare, red, blue, told)}) == 4
    # As it was before there were images.
    assert fingerprint([read(bare)])[:16] == "f475e54e95106198"
    assert content(read(red)) != content(read(blue)) and content(read(red)) == content(read(told))
    rows = prompts_from_rows([{"prompt": "What?", "image": encoded(shade, mode="L")} for shade in range(10)])
    rest, held_out = set_aside(rows, range(10), 2, lambda _: True)
    assert (len(rest), len(held_out)) == (8, 2)


def test_turns_of_a_user_are_joined_with_their_images() -> None:
    first, second = (
        Message("user", f"{PLACEHOLDER}{word}", images=(PromptImage.of(Image.new("L", (2, 2))),)) for word in "ab"
    )
    prompt = Prompt("x", (first,)).then([second])
    assert prompt.text == f"{PLACEHOLDER}a\n\n{PLACEHOLDER}b" and len(prompt.images) == 2
    prompt = Prompt("x", (first,)).then([Message("user", f"odd {PLACEHOLDER}")])
    assert prompt.text == f"{PLACEHOLDER}a\n\nodd [image]" and len(prompt.images) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.text(max_size=6), st.integers(0, 2)), min_size=1, max_size=5), min_size=1, max_size=4
    )
)
def test_parts_come_back_as_they_were_given(turns: list[list[str | int]]) -> None:
    """Whatever the parts are, the template reads the same texts and images in the same order."""
    images = (RED, BLUE, GREEN)
    messages = [
        {
            "role": "system",
            "content": [
                {"type": "text", "text": own}
                if isinstance(own, str)
                else {"type": "image", "url": data_url(images[own])}
                for own in parts
            ],
        }
        for parts in turns
    ]
    row = {"messages": [*messages, {"role": "user", "content": "x"}]}
    odd = any(
        PLACEHOLDER in own
        for parts in turns
        for own in parts
        if isinstance(own, str) and any(isinstance(p, int) for p in parts)
    )
    if odd:
        with pytest.raises(UserError, match=r"U\+FFFC"):
            read(row)
        return
    prompt = read(row)
    assert digests(prompt) == [digest_of(images[own]) for parts in turns for own in parts if isinstance(own, int)]
    for parts, message in zip(turns, prompt.messages, strict=False):
        assert message.content.count(PLACEHOLDER) >= len(message.images)
        shown = message.as_dict()["content"]
        kinds = [part["type"] for part in shown] if isinstance(shown, list) else ["text"]
        assert kinds.count("image") == sum(isinstance(own, int) for own in parts)
