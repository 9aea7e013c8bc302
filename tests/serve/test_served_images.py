"""Images for a model on a server: the numbers are the local ones, each image travels once, and bad ones are refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from image_models import make_image_model
from PIL import Image
from safetensors.torch import load, save
from served import Process, answering, connected, in_thread

from retort import config as configuration
from retort.core.images import PromptImage
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.models.fingerprint import digests_of, fingerprint_of
from retort.models.load import load_model
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.served import ServedEngine
from retort.serve.app import application
from retort.serve.images import HeldImages
from retort.serve.scorer import Scorer
from retort.train import runner
from retort.wire.media import as_digests, with_bytes
from retort.wire.protocol import IMAGES, SCORE, TENSORS, packed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, and data with images."""
    made = tmp_path_factory.mktemp("images")
    make_image_model(made / "student", "idefics3", seed=1)
    make_image_model(made / "teacher", "idefics3", seed=2)
    rows = list[str]()
    for number in range(6):
        picture(number).save(made / f"{number}.png")
        row = {"prompt": f"what is {number} ?", "images": [f"{number}.png"], "answer": "a", "response": f"{number} a"}
        rows.append(json.dumps(row))
    (made / "data.jsonl").write_text("\n".join(rows))
    return made


@pytest.fixture(scope="module")
def teacher(home: Path) -> Any:
    return load_model(str(home / "teacher"), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    found = Process(tmp_path_factory.mktemp("server"), home / "teacher")
    yield found
    found.end()


@pytest.fixture(scope="module")
def http(teacher: Any) -> Iterator[httpx2.Client]:
    scorer = Scorer(teacher, name="tiny", most_tokens=4096)
    with answering(application(scorer)) as url, httpx2.Client(base_url=url) as client:
        yield client


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def asked(lm: Any, images: list[PromptImage], text: str, answer: str) -> TokenSequence:
    """A text with images before it, and an answer that was decided."""
    ids, media = list[int](), list[Media]()
    for image in images:
        own = list(lm.image_tokens.ids(image))
        media.append(Media(image.digest, len(ids), len(own), image))
        ids += [*own, *lm.tokenizer.encode(" ")]  # some families need a token between images
    context = TokenSequence.of([*ids, *lm.tokenizer.encode(text)], tuple(media))
    return context.then(lm.tokenizer.encode(answer), decided=True)


def settings_of(home: Path, method: str, **more: Any) -> Any:
    settings = {
        "student": str(home / "student"),
        "teacher": str(home / "teacher"),
        "data": str(home / "data.jsonl"),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 1,
        "method": {"name": method},
        "rollout": {"prompts": 3, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-2},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
    }
    return configuration.resolve(settings, more)


def weights(config: Any, folder: Path) -> bytes:
    runner.start(config, folder).go()
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["opd", "eopd", "gkd", "va_opd"])
def test_a_step_is_the_local_one_to_the_last_bit(method: str, home: Path, server: Process, tmp_path: Path) -> None:
    local = weights(settings_of(home, method), tmp_path / "local")
    assert weights(settings_of(home, method, teacher=server.url), tmp_path / "served") == local


def test_each_image_is_sent_once_and_again_to_a_server_that_was_started_anew(server: Process, teacher: Any) -> None:
    served = connected(server.url, teacher)
    images = [PromptImage.of(picture(90 + seed)) for seed in range(2)]
    sequences = [
        asked(served, images[:1], "one", "a b"),
        asked(served, images, "two", "c"),
        TokenSequence.of([5, 6]).then([7, 2], decided=True),
        asked(served, images[:1], "one", "d e f"),
    ]
    before, size = served.server.images.sent, sum(len(image.encoded()) for image in images)
    expected = teacher.all_hidden(sequences, 500)
    assert torch.equal(served.all_hidden(sequences, 500), expected)
    assert served.server.images.sent - before == size
    assert torch.equal(served.all_hidden(sequences, 500), expected)
    another = connected(server.url, teacher)  # another run
    assert torch.equal(another.all_hidden(sequences, 500), expected)
    assert (served.server.images.sent - before, another.server.images.sent) == (size, 0)
    server.again()
    assert torch.equal(served.all_hidden(sequences, 500), expected)
    assert served.server.images.sent - before == 2 * size


def test_what_it_generates_is_what_the_model_generates_here(server: Process, teacher: Any) -> None:
    served = connected(server.url, teacher)
    contexts = [asked(served, [PromptImage.of(picture(seed))], "?" * seed, "").read() for seed in (1, 2, 3)]
    draws = [torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
    requests = [Request(own, uniforms) for own, uniforms in zip(contexts, draws, strict=True)]
    vocab = len(teacher.tokenizer)
    here, there = (
        kind(lm, vocab=vocab, max_parallel=8).generate(requests, Sampling(7, 1.0, 1.0))
        for kind, lm in ((HFEngine, teacher), (ServedEngine, served))
    )
    assert [own.ids for own in here] == [own.ids for own in there]
    assert all(torch.equal(own.logp_A, other.logp_A) for own, other in zip(here, there, strict=True))


def test_its_processor_is_here_and_another_one_is_noticed(server: Process, teacher: Any, tmp_path: Path) -> None:
    served = connected(server.url, teacher)
    image = PromptImage.of(picture(7, (90, 30)))
    assert served.image_tokens.ids(image) == teacher.image_tokens.ids(image)
    assert served.image_tokens.settings() == teacher.image_tokens.settings()
    served.verify(1e-6)
    folder = make_image_model(tmp_path / "other", "idefics3", seed=2, image_mean=[0.1, 0.2, 0.3])
    other = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    assert other.digest() == teacher.digest(), "only its processor is another one"
    with in_thread(other) as url:
        served.server = connected(url, other).server
        with pytest.raises(UserError, match="it has another model than before"):
            served.verify(1e-2)


def test_a_server_that_keeps_too_few_images_is_one_line(teacher: Any) -> None:
    scorer = Scorer(teacher, name="tiny", most_tokens=4096)
    scorer.images = HeldImages(room=10)
    with answering(application(scorer)) as url:
        served = connected(url, teacher)
        two = asked(served, [PromptImage.of(picture(seed)) for seed in (1, 2)], "x", "y")
        with pytest.raises(UserError, match="does not keep the 2 images of one batch"):
            served.all_hidden([two], 500)


def post(http: httpx2.Client, tensors: dict[str, torch.Tensor], path: str = IMAGES, **settings: Any) -> httpx2.Response:
    content = save(tensors, {"settings": json.dumps(settings)})
    return http.post(path, content=content, headers={"Content-Type": TENSORS})


def png(width: int, height: int) -> bytes:
    """A file that says that it has so many pixels, and has none."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    chunks = [struct.pack(">I", len(own) - 4) + own + struct.pack(">I", zlib.crc32(own)) for own in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **more)
    return held.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "no image": (b"hello", "its format is not known"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript"),
    "cut off": (encoded(picture(1), "PNG")[:200], "broken or cut off"),
    "too many pixels": (png(9000, 9000), "at most 50,000,000 are read"),
    "far too many pixels": (png(60000, 60000), "far more than 50,000,000 pixels"),
    "no pixels": (png(0, 5), "broken|nothing to see|not known"),
    "a thread": (encoded(Image.new("1", (1, 40_000)), "PNG"), "times the pixels of the other"),
    "a film": (
        encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
        "2 frames",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_an_image_that_cannot_be_read_is_refused_in_one_line(what: str, http: httpx2.Client) -> None:
    content, words = BAD[what]
    sizes = torch.tensor([len(content)])
    body = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
    found = post(http, {"digests_I32": as_digests([]), "encoded_B": body, "sizes_I": sizes})
    assert found.status_code == 400
    detail = found.json()["detail"]
    assert any(word in detail for word in words.split("|")), detail
    assert "\n" not in detail
    assert http.get("/health").status_code == 200


def test_media_that_are_none_are_refused(http: httpx2.Client, teacher: Any) -> None:
    image = PromptImage.of(picture(70))
    sequence = asked(teacher, [image], "what", "a")
    whole = packed([sequence])
    settings = {"weights": teacher.digest(), "vocab": teacher.head().width, "temperature": 1.0}
    settings |= {"entropy": False, "top_k": 0, "budget": 99}

    def status(**changed: torch.Tensor) -> int:
        return post(http, {**whole, **changed}, SCORE, **settings).status_code

    assert status() == 424, "it was not sent"
    sent = with_bytes([image])
    assert post(http, {**sent, "sizes_I": sent["sizes_I"] + 1}).status_code == 400
    answer = post(http, sent)
    assert answer.status_code == 200
    assert load(answer.content)["lacking_I"].tolist() == [0]
    assert status() == 200
    _, _, position, length = whole["media_M4"][0].tolist()
    end = len(sequence)
    for row in (
        [1, 0, position, length],
        [0, 1, position, length],
        [0, 0, -1, length],
        [0, 0, end - 1, length],
        [0, 0, position, 0],
        [0, 0, end - 1, 1],  # it was decided
        [0, 0, position, length - 1],  # the processor makes one more
        [0, 0, position + 1, length],
    ):
        assert status(media_M4=torch.tensor([row])) == 400, row
    assert status(media_M4=whole["media_M4"].repeat(2, 1)) == 400, "twice the same place"
    assert status(media_M4=whole["media_M4"].int()) == 400
    assert status(digests_I32=whole["digests_I32"][:, :-1].contiguous()) == 400
    assert status(digests_I32=255 - whole["digests_I32"]) == 424


def test_a_server_with_a_model_of_text_takes_no_image(model_folder: Any, home: Path, teacher: Any) -> None:
    lm = load_model(str(model_folder(seed=2)), role="teacher", precision="fp32", device=torch.device("cpu"))
    with answering(application(Scorer(lm, name="tiny", most_tokens=4096))) as url:
        assert connected(url, lm).image_tokens is None
        with httpx2.Client(base_url=url) as http:
            found = post(http, with_bytes([PromptImage.of(picture(1))]))
            assert (found.status_code, found.json()["detail"]) == (400, "its model reads text alone")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_families_are_read_as_they_are_here(family: str, tmp_path: Path) -> None:
    """Their processors come over the wire, also one whose part for videos cannot be made here."""
    folder = make_image_model(tmp_path / "model", family, seed=3)
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as url:
        served = connected(url, lm)
        images = [PromptImage.of(picture(1)), PromptImage.of(picture(2, (30, 64)))]
        sequences = [asked(served, images, "two", "a b"), asked(served, images[1:], "one", "c d e")]
        assert torch.equal(served.all_hidden(sequences, 500), lm.all_hidden(sequences, 500))
        assert fingerprint_of(served, digests_of(served)) != fingerprint_of(lm, digests_of(lm)), "its word alone"
        assert digests_of(served) == digests_of(lm)


def test_images_that_a_family_cannot_read_where_they_are_end_no_server(tmp_path: Path) -> None:
    lm = load_model(
        str(make_image_model(tmp_path / "model", "qwen2_5_vl")),
        role="teacher",
        precision="fp32",
        device=torch.device("cpu"),
    )
    images = [PromptImage.of(picture(seed)) for seed in (1, 2)]
    one, two = (list(lm.image_tokens.ids(own)) for own in images)  # type: ignore[union-attr]
    media = (
        Media(images[0].digest, 1, len(one), images[0]),
        Media(images[1].digest, 1 + len(one), len(two), images[1]),
    )
    touching = TokenSequence.of([5, *one, *two, 6], media).then([7], decided=True)
    with in_thread(lm) as url:
        served = connected(url, lm)
        with pytest.raises(UserError, match="it answers 400: the model cannot read the images where the request has"):
            served.all_hidden([touching], 500)
        served.verify(1e-6)
