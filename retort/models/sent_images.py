"""The images that a server was sent: each goes to it once, for as long as it holds it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from retort.core.images import PromptImage
from retort.errors import SignalError, UserError
from retort.wire import Client
from retort.wire.batches import neighbours
from retort.wire.media import MOST_SENT, as_digests, with_bytes
from retort.wire.protocol import IMAGES

#: Digests of one question.
_TOGETHER = 4096


class SentImages:
    """What one server holds of a run's images, as far as the run knows. Methods may be called from several threads.

    Attributes:
        sent: Bytes of images that were sent.
    """

    def __init__(self, client: Client) -> None:
        """Knows of none yet; the server is asked before any is sent, since other runs may have sent the same."""
        self._client, self._lock = client, threading.Lock()
        self._held = set[str]()
        self.sent = 0

    def forget(self, images: Mapping[str, PromptImage]) -> None:
        """Takes images for not held: the server said that it lacks some of them."""
        with self._lock:
            self._held.difference_update(images)

    def send(self, images: Mapping[str, PromptImage]) -> None:
        """Sends those images, by digest, that the server does not hold.

        Raises:
            UserError: An image cannot be read any more, is larger than what a server takes, or is refused.
            UnreachableError: There was no usable answer within the patience of the client.
        """
        with self._lock:  # so that two threads do not send the same
            open_ = [digest for digest in images if digest not in self._held]
            lacking = [
                images[digest]
                for start in range(0, len(open_), _TOGETHER)
                for digest in self._lacking(open_[start : start + _TOGETHER])
            ]
            sizes = [self._size(own) for own in lacking]
            for part in neighbours(sizes, MOST_SENT):
                self._client.post_tensors(IMAGES, with_bytes(lacking[part]), {})
                self.sent += sum(sizes[part])
            self._held.update(open_)

    def _lacking(self, digests: Sequence[str]) -> list[str]:
        """Those of some digests that the server does not hold."""
        found = self._client.post_tensors(IMAGES, {"digests_I32": as_digests(digests)}, {}).get("lacking_I")
        if found is None or tuple(found.shape) != (len(digests),):
            raise SignalError(f"{self._client.url}: was asked about {len(digests)} images, and answers something else")
        return [digest for digest, lacks in zip(digests, found.tolist(), strict=True) if lacks]

    def _size(self, image: PromptImage) -> int:
        """Bytes of an encoded image that may be sent."""
        size = len(image.encoded())
        if size > MOST_SENT:
            raise UserError(
                f"{self._client.url}: an image of {image.size[0]} x {image.size[1]} pixels has {size:,} bytes, and a "
                f"server takes {MOST_SENT:,}; save it as JPEG, or make it smaller"
            )
        return size
