"""Changed images: size and mode stay, pixelation is the published rule, and what was changed is kept within bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from imaged import asked, picture
from PIL import Image

from retort.core.images import PromptImage
from retort.errors import UserError
from retort.views import Changed, blank, blur, crop, pixelate

CHANGES: dict[str, Callable[[Any], Any]] = {
    "pixelate": pixelate,
    "blur": blur,
    "blank": blank,
    "grey": lambda image: blank(image, (128, 128, 128)),
    "crop": lambda image: crop(image, (0.25, 0.25, 0.75, 1.0)),
}


def gradient(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB").convert(mode)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("size", [(37, 23), (1, 1), (3, 200)])
def test_size_and_mode_stay_and_the_image_is_not_changed(name: str, mode: str, size: tuple[int, int]) -> None:
    image = gradient(mode, size)
    before = image.tobytes()
    found = CHANGES[name](image)
    assert (found.size, found.mode) == (image.size, image.mode)
    assert found is not image
    assert image.tobytes() == before
    assert CHANGES[name](image).tobytes() == found.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("size", "ratio"), [((40, 30), 0.1), ((37, 23), 0.1), ((5, 9), 0.1), ((40, 30), 0.25)])
def test_pixelation_is_bilinear_down_and_nearest_up(mode: str, size: tuple[int, int], ratio: float) -> None:
    image = gradient(mode, size)
    sides = (max(1, int(size[0] * ratio)), max(1, int(size[1] * ratio)))
    small = image.resize(sides, Image.Resampling.BILINEAR)
    found = pixelate(image, ratio)
    for x in range(size[0]):
        for y in range(size[1]):
            across, down = (x + 0.5) * sides[0] / size[0], (y + 0.5) * sides[1] / size[1]
            if across % 1 and down % 1:  # the middle of a pixel that lies on the edge of two blocks may be of either
                assert found.getpixel((x, y)) == small.getpixel((int(across), int(down)))


def test_palettes_and_bits_are_interpolated_in_colours() -> None:
    """A palette's numbers are no colours: half red, half blue is purple in between, not the colour of a mean number."""
    image = Image.new("P", (20, 10))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.paste(2, (10, 0, 20, 10))
    found = pixelate(image, 0.01).convert("RGB")
    red, green, blue = found.getpixel((5, 5))  # type: ignore[misc]
    assert red > 80 and blue > 80 and green < 60
    bits = Image.new("1", (20, 10))
    bits.paste(1, (2, 0, 20, 10))
    assert pixelate(bits, 0.01).mode == "1"
    assert 0.6 < sum(bool(value) for value in pixelate(bits, 0.01).convert("L").tobytes()) / 200 <= 1.0


def test_a_ratio_of_one_changes_nothing() -> None:
    image = gradient("RGB")
    assert pixelate(image, 1.0).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: pixelate(image, 0.0), "pixelate: ratio"),
        (lambda image: pixelate(image, 1.5), "pixelate: ratio"),
        (lambda image: pixelate(image, float("nan")), "pixelate: ratio"),
        (lambda image: blur(image, 0.0), "blur: radius"),
        (lambda image: crop(image, (0.5, 0.0, 0.5, 1.0)), "crop: a box"),
        (lambda image: crop(image, (0.0, 0.0, 1.2, 1.0)), "crop: a box"),
    ],
    ids=["none", "more", "nan", "radius", "empty", "outside"],
)
def test_what_makes_no_sense_is_refused(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        change(gradient("RGB"))


def test_a_crop_keeps_its_part_in_place() -> None:
    image = gradient("RGB", (40, 40))
    found = crop(image, (0.5, 0.0, 1.0, 1.0))
    half = (20, 0, 40, 40)
    assert found.crop(half).tobytes() == image.crop(half).tobytes()
    assert len(found.crop((0, 0, 20, 40)).getcolors() or ()) == 1
    assert crop(image, (0.0, 0.0, 1.0, 1.0)).tobytes() == image.tobytes()
    assert crop(image, (0.999, 0.999, 1.0, 1.0)).getpixel((39, 39)) == image.getpixel((39, 39))


@pytest.mark.parametrize("name", CHANGES)
def test_images_of_prompts_are_changed_alike(name: str) -> None:
    own = picture(3)
    found = CHANGES[name](own)
    assert isinstance(found, PromptImage)
    assert found.size == own.size
    assert found.decoded().tobytes() == CHANGES[name](own.decoded()).tobytes()


def test_what_was_changed_is_kept_within_bounds() -> None:
    calls: list[str] = []

    def change(image: PromptImage) -> PromptImage:
        calls.append(image.digest)
        return pixelate(image)

    images = [picture(seed) for seed in range(4)]
    size = len(pixelate(images[0]).encoded())
    changed = Changed(change, keep=int(2.5 * size))
    for image in (*images, images[3], images[0]):
        assert changed.image(image).size == image.size
    assert calls == [image.digest for image in (*images, images[0])], "the last ones are kept, the first one is gone"
    prompt = asked()
    assert Changed(change, keep=0)(prompt).images[0] == pixelate(prompt.images[0])
