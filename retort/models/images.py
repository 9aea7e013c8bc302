"""A model's own processor of images: the tokens that stand for an image, and the arrays that its model reads."""

from __future__ import annotations

import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.sequences import TokenSequence
from retort.errors import UserError, shortened

#: Numbers of processed images, and image features, that are kept: 256 MiB of each in fp32.
KEPT_NUMBERS = 2**26
#: Tokens of images that are kept.
_KEPT_TOKENS = 2**20


class Bounded:
    """A cache of limited size; what was not asked for the longest leaves first."""

    def __init__(self, room: int, size: Callable[[Any], int]) -> None:
        """Begins empty; the sizes of all that is kept sum to at most `room`."""
        self._room, self._size, self._filled = room, size, 0
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.RLock()  # requests to a server are put together in several threads

    def get(self, key: Hashable) -> Any:
        """What is kept under a key; None where nothing is."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: Hashable, made: Any) -> None:
        """Keeps something under a key that has nothing yet."""
        with self._lock:
            self._filled += self._size(made)
            self._found[key] = made
            while self._filled > self._room and len(self._found) > 1:
                self._filled -= self._size(self._found.popitem(last=False)[1])

    def got(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key, or else is made, and kept."""
        with self._lock:
            found = self.get(key)
            if found is None:
                found = make()
                self.put(key, found)
            return found


@dataclass(frozen=True, eq=False)
class Processed:
    """What a processor makes of the images of one text.

    Attributes:
        arrays: What the vision tower reads: pixels, their grid or mask, ..., by the names of the model's arguments.
        kinds: For each of the tokens its kind (text, image), by the names of the model's arguments; most have none.
    """

    arrays: Mapping[str, Tensor]
    kinds: Mapping[str, tuple[int, ...]]


class ImageProcessing:
    """A processor of transformers with caches: `retort.align.images.ImageTokens`, and pixels for the model.

    Attributes:
        processor: Of transformers.
        name: The model's name, for messages.
        placeholder: Id of the token that the chat template writes for each image.
        video: Settings of a video part that this process cannot make; they are saved as they came.
    """

    def __init__(self, processor: Any, name: str, video: Mapping[str, Any] | None = None) -> None:
        """Wraps a processor.

        Raises:
            UserError: It does not say which token stands for an image.
        """
        self.processor, self.name, self.video = processor, name, video
        self._text = str(getattr(processor, "image_token", "") or "")
        found = processor.tokenizer.convert_tokens_to_ids(self._text) if self._text else None
        if not isinstance(found, int) or found == processor.tokenizer.unk_token_id:
            raise UserError(
                f"{name}: its {type(processor).__name__} names no token for images that its tokenizer has; copy "
                "processor and tokenizer of the model anew"
            )
        self.placeholder = found
        self._tokens = Bounded(_KEPT_TOKENS, lambda own: len(own[0]))
        self._processed = Bounded(KEPT_NUMBERS, lambda own: sum(array.numel() for array in own.arrays.values()))

    def ids(self, image: PromptImage) -> Sequence[int]:
        """See `retort.align.images.ImageTokens`."""
        return self._one(image)[0]

    def kinds(self, image: PromptImage) -> Mapping[str, tuple[int, ...]]:
        """The kind of each of an image's tokens, by the names of the model's arguments."""
        return self._one(image)[1]

    def arrays(self, images: Sequence[PromptImage]) -> Mapping[str, Tensor]:
        """What the model reads for the images of one text, in order, by the names of its arguments.

        Raises:
            UserError: The processor refuses an image.
        """
        key = tuple(image.digest for image in images)
        return self._processed.got(key, lambda: self._made(images)[1]).arrays

    def _one(self, image: PromptImage) -> tuple[tuple[int, ...], Mapping[str, tuple[int, ...]]]:
        def make() -> tuple[tuple[int, ...], Mapping[str, tuple[int, ...]]]:
            ids, processed = self._made([image])
            self._processed.got((image.digest,), lambda: processed)
            return ids, processed.kinds

        return self._tokens.got(image.digest, make)

    def _made(self, images: Sequence[PromptImage]) -> tuple[tuple[int, ...], Processed]:
        decoded = [image.decoded() for image in images]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.processor(
                    images=decoded, text=[self._text * len(images)], add_special_tokens=False, return_tensors="pt"
                )
        except Exception as error:  # each family's processor refuses in its own way
            sizes = ", ".join(f"{width} x {height}" for width, height in (image.size for image in images))
            said = shortened(" ".join(str(error).split()), 200)
            raise UserError(
                f"the processor of {self.name} refuses an image of {sizes} pixels: {said}; leave that row out"
            ) from None
        parts = {str(name): part for name, part in dict(found).items() if isinstance(part, Tensor)}
        ids = tuple(parts.pop("input_ids")[0].tolist())
        parts.pop("attention_mask", None)
        kinds = {name: tuple(parts.pop(name)[0].tolist()) for name in list(parts) if name.endswith("token_type_ids")}
        return ids, Processed(parts, kinds)

    def check(self, sequences: Sequence[TokenSequence], where: str) -> None:
        """Checks that the tokens of all images are those that this processor makes.

        Raises:
            UserError: One is no image, or has other tokens.
        """
        for sequence in sequences:
            for own in sequence.media:
                if not isinstance(own.payload, PromptImage):
                    raise UserError(f"{where} holds a sound or a video, which {self.name} does not read")
                expected = self.ids(own.payload)
                found = tuple(sequence.tokens_L[own.position : own.position + own.length].tolist())
                if found != tuple(expected):
                    raise UserError(
                        f"{where} holds an image as {own.length} tokens, and the processor of {self.name} makes "
                        f"{len(expected)} of it; render it with that model's own processor"
                    )

    def adopt(self, tokenizer: Any) -> Any:
        """The tokenizer of the processor, which knows its tokens, with the template that belongs to it.

        Args:
            tokenizer: The model's own, which has a template where the processor has none.
        """
        own = self.processor.tokenizer
        own.chat_template = self.processor.chat_template or tokenizer.chat_template
        return own

    def settings(self) -> str:
        """What the tokens and pixels of an image depend on besides the tokenizer, as JSON, for digests."""
        found = {
            name: own
            for name, own in self.processor.to_dict().items()
            if name not in ("processor_class", "auto_map", "_name_or_path", "video_processor")
        }
        return json.dumps(found, sort_keys=True, default=str)

    def save(self, folder: Path) -> None:
        """Saves it as `AutoProcessor.from_pretrained` opens it; the tokenizer, too."""
        self.processor.save_pretrained(folder)
        if self.video is not None:
            (folder / "video_preprocessor_config.json").write_text(json.dumps(dict(self.video), indent=2) + "\n")


def made_up(width: int = 40, height: int = 24, seed: int = 0) -> PromptImage:
    """An image of random pixels, to try a model with."""
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 255, (height, width, 3), generator=draw, dtype=torch.uint8)
    return PromptImage.of(Image.fromarray(pixels.numpy()))


def same_image_tokens(student: Any, teacher: Any, images: Sequence[PromptImage]) -> None:
    """Checks that two models write as many tokens for each of these images.

    Args:
        student: A `LanguageModel` that reads images.
        teacher: Another.
        images: To be tried; one of each size is enough, and is what is tried.

    Raises:
        UserError: They do not, for one of them.
    """
    for image in {image.size: image for image in images}.values():
        own, other = (len(lm.image_tokens.ids(image)) for lm in (student, teacher))
        if own != other:
            raise UserError(
                f"an image of {image.size[0]} x {image.size[1]} pixels is {own} tokens to the student {student.name}, "
                f"and {other} to the teacher {teacher.name}; give both the same processor (processor_config.json)"
            )
