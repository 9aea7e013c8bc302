"""The images that a server holds for its clients: encoded, by digest, and no more of them than there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retort.core.images import PromptImage, digest_of
from retort.data.images import shown_size
from retort.errors import UserError
from retort.models.images import Bounded
from retort.wire.media import digests_in, encoded_in
from retort.wire.protocol import LACKING

#: Bytes of all encoded images that are held: 1 GiB. What was not asked for the longest leaves first.
ROOM = 2**30


class LackingError(UserError):
    """A request names images that the server does not hold; the client sends them, and asks again."""

    status = LACKING


class HeldImages:
    """Images that clients sent. Only images that can be decoded are held, so a client's mistake is found at once."""

    def __init__(self, room: int = ROOM) -> None:
        """Holds none yet, and later at most so many bytes of them, or one image."""
        self._held = Bounded(room, lambda own: len(own.source))

    def got(self, digests: Sequence[str]) -> list[PromptImage]:
        """The images with these digests.

        Raises:
            LackingError: One is not held.
        """
        found = [self._held.get(own) for own in digests]
        lacking = sum(own is None for own in found)
        if lacking:
            raise LackingError(f"{lacking} of {len(found)} images of the request are not held; send them first")
        return found

    def exchanged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Holds the images that a request sends, and says which of those that it names are lacking, `lacking_I`.

        Raises:
            UserError: The request is none, or an image in it cannot be read.
        """
        try:
            digests, sent = digests_in(tensors), encoded_in(tensors)
        except ValueError as error:
            raise UserError(str(error)) from None
        for number, encoded in enumerate(sent):
            digest = digest_of(encoded)
            if self._held.get(digest) is None:
                size = shown_size(f"image {number + 1} of the request", encoded)
                self._held.put(digest, PromptImage(digest, encoded, size))
        return {"lacking_I": torch.tensor([self._held.get(own) is None for own in digests]).to(torch.uint8)}
