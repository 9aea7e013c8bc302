"""A turn of a conversation: its text, and the images in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from retort.core.images import PromptImage, in_words, parts_of


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the speaker.
        content: Text of the turn; empty for a turn that only calls tools.
        extra: Other fields of the turn that a chat template may read, JSON values by their names there: `tool_calls`,
            `tool_call_id`, `name`, `reasoning_content`, ...
        images: The images in it, in order; of a turn that has any, `content` holds one `PLACEHOLDER`
            (`retort.core.images`) where each of them stands.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=lambda: {}, hash=False)
    images: tuple[PromptImage, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates read it; the content of one with images is a list of parts."""
        return {"role": self.role, "content": self.parts(self.content), **self.extra}

    @property
    def readable(self) -> str:
        """Its text for people and graders: words stand where an image does."""
        return in_words(self.content) if self.images else self.content

    def parts(self, content: str) -> str | list[dict[str, str]]:
        """Another text in place of the turn's own, as chat templates read it: of a turn with images a list of parts."""
        return parts_of(content) if self.images else content


def joined(one: Message, other: Message) -> Message:
    """A turn of two, with an empty line between."""
    images = (*one.images, *other.images)
    texts = [in_words(own.content) if images and not own.images else own.content for own in (one, other)]
    return replace(one, content="\n\n".join(texts), images=images)
