"""Puts the images of a row where its text says: parts of messages, and placeholders `<image>` in a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from retort.core.images import PLACEHOLDER, WRITTEN, PromptImage
from retort.core.rollouts import Message
from retort.data.media import holds_something
from retort.errors import UserError, counted, quoted

__all__ = ["IMAGE_PARTS", "RowImages", "with_images"]

#: Types of parts that are images: of transformers, of OpenAI's two interfaces.
IMAGE_PARTS = ("image", "image_url", "input_image")
#: Keys of a part that say something of it, and hold no image.
_ABOUT = ("type", "index", "text", "detail", "cache_control")


class RowImages:
    """The images of a row's column, which parts and placeholders take one after another."""

    def __init__(
        self, read: Callable[[str, Any], PromptImage], column: Sequence[PromptImage] = (), *, given: bool = False
    ) -> None:
        """Begins with the first image of the column.

        Args:
            read: Reads the image inside a part; the first argument names it, for messages.
            column: The images of the column.
            given: Whether the row has such a column, though it may be empty.
        """
        self._read = read
        self._column = tuple(column)
        self._given = given or bool(column)
        self._next = 0
        self._taken = set[int]()

    def again(self) -> RowImages:
        """The same images for another conversation of the row."""
        return RowImages(self._read, self._column, given=self._given)

    def part(self, at: str, part: Mapping[Any, Any]) -> PromptImage:
        """The image of a part: the one that it holds, or else the next of the column, or the one that it numbers.

        Raises:
            UserError: There is no such image, or what it holds cannot be read.
        """
        inside = {key: value for key, value in part.items() if key not in _ABOUT and holds_something(value)}
        if inside:
            return self._read(at, inside)
        if part.get("type") != "image":
            raise UserError(f"{at}: a part of type {quoted(part.get('type'))} holds no image")
        number = part.get("index")
        if number is None:
            number, self._next = self._next, self._next + 1
        if not isinstance(number, int) or not 0 <= number < len(self._column):
            raise UserError(
                f"{at}: is a placeholder without an image: the column 'images' has {len(self._column)}; give one for "
                "each, in order"
            )
        self._taken.add(number)
        return self._column[number]

    def placed(self, where: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with all images of the column.

        Where no part has taken any, those that people write are filled: `<image>` in turns that are not the
        assistant's. Without these, the images come before the text of the only turn of the user.

        Raises:
            UserError: There are more placeholders than images, or fewer; or it is not clear which turn has the images.
        """
        if any(message.images for message in messages) or self._taken:
            left = len(self._column) - len(self._taken)
            if left:
                raise UserError(
                    f"{where}: {counted(left, 'image')} of the column 'images' have no placeholder in the messages; "
                    "write a part of type image for each"
                )
            return tuple(messages)
        counts = [message.content.count(WRITTEN) * (message.role != "assistant") for message in messages]
        if self._given and sum(counts) not in (0, len(self._column)):
            raise UserError(
                f"{where}: the text has {counted(sum(counts), 'placeholder')} {WRITTEN} for "
                f"{counted(len(self._column), 'image')}; each image needs one, and each placeholder an image"
            )
        if not self._column:
            return tuple(messages)
        return self._written(where, messages, counts) if sum(counts) else self._first(where, messages)

    def _written(self, where: str, messages: Sequence[Message], counts: Sequence[int]) -> tuple[Message, ...]:
        left = iter(self._column)
        return tuple(
            with_images(where, message, message.content.split(WRITTEN), [next(left) for _ in range(count)])
            if count
            else message
            for message, count in zip(messages, counts, strict=True)
        )

    def _first(self, where: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        users = [place for place, message in enumerate(messages) if message.role == "user"]
        if len(users) != 1:
            raise UserError(
                f"{where}: it is not clear to which of {counted(len(users), 'turn')} of the user the images belong; "
                f"write {WRITTEN} where each of them stands"
            )
        own = messages[users[0]]
        texts = [*[""] * len(self._column), own.content]
        return (*messages[: users[0]], with_images(where, own, texts, self._column), *messages[users[0] + 1 :])


def with_images(where: str, message: Message, texts: Sequence[str], images: Sequence[PromptImage]) -> Message:
    """A message of texts with an image between each two of them.

    Raises:
        UserError: A text holds the character that stands for an image.
    """
    if any(PLACEHOLDER in text for text in texts):
        raise UserError(
            f"{where}: the text beside an image holds the character U+FFFC, which stands for an image itself; remove it"
        )
    return replace(message, content=PLACEHOLDER.join(texts), images=tuple(images))
