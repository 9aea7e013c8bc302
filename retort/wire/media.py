"""Images of sequences on their way to a server: their digests and places in each request, their bytes once.

Axes: `retort.core`; S is sequences, M media in them, I different images, B the bytes of all images end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.sequences import Media, TokenSequence

__all__ = [
    "MOST_SENT",
    "as_digests",
    "as_tensors",
    "digests_in",
    "encoded_in",
    "images_in",
    "placed_media",
    "with_bytes",
]

#: Most bytes of images in one request that sends them, and so of one image: 64 MiB.
MOST_SENT = 2**26
_DIGEST = 32


def images_in(sequences: Sequence[TokenSequence]) -> dict[str, PromptImage]:
    """The different images of sequences, by digest."""
    return {own.digest: own.payload for sequence in sequences for own in sequence.media}


def as_digests(digests: Sequence[str]) -> Tensor:
    """Digests as a tensor of their bytes, [I, 32]."""
    return torch.tensor([list(bytes.fromhex(own)) for own in digests], dtype=torch.uint8).reshape(-1, _DIGEST)


def as_tensors(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """The media of sequences: for each its sequence, image, position and length, and the digests of the images.

    Nothing where there are none.
    """
    number = {digest: index for index, digest in enumerate(images_in(sequences))}
    if not number:
        return {}
    media = [
        [index, number[own.digest], own.position, own.length]
        for index, sequence in enumerate(sequences)
        for own in sequence.media
    ]
    return {"media_M4": torch.tensor(media), "digests_I32": as_digests(list(number))}


def with_bytes(images: Sequence[PromptImage]) -> dict[str, Tensor]:
    """Images with their encoded bytes, as a request sends them.

    Raises:
        UserError: A file of an image is gone, or holds another one.
    """
    parts = [torch.frombuffer(bytearray(own.encoded()), dtype=torch.uint8) for own in images]
    return {
        "digests_I32": as_digests([own.digest for own in images]),
        "encoded_B": torch.cat(parts),
        "sizes_I": torch.tensor([len(own) for own in parts]),
    }


def digests_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """The digests in a request of a client's.

    Raises:
        ValueError: They are none.
    """
    found = tensors.get("digests_I32")
    if found is None or found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != _DIGEST:
        raise ValueError("digests_I32 is uint8, [images, 32]")
    return [bytes(own.tolist()).hex() for own in found]


def encoded_in(tensors: Mapping[str, Tensor]) -> list[bytes]:
    """The encoded bytes of each image that a request of a client's sends; none where it sends none.

    Raises:
        ValueError: They are none.
    """
    encoded_B, sizes_I = tensors.get("encoded_B"), tensors.get("sizes_I")
    if encoded_B is None and sizes_I is None:
        return []
    if encoded_B is None or sizes_I is None or encoded_B.dtype != torch.uint8 or sizes_I.dtype != torch.long:
        raise ValueError("encoded_B (uint8) and sizes_I (int64) go together")
    sizes: list[int] = sizes_I.flatten().tolist()
    if encoded_B.ndim != 1 or min(sizes, default=0) < 0 or sum(sizes) != len(encoded_B):
        raise ValueError("encoded_B and sizes_I disagree")
    return [own.numpy().tobytes() for own in encoded_B.split(sizes)]


def placed_media(
    tensors: Mapping[str, Tensor],
    sequences: Sequence[TokenSequence],
    images: Callable[[Sequence[str]], Sequence[PromptImage]],
) -> list[TokenSequence]:
    """The sequences of a client's with the media that its request names.

    Args:
        tensors: Of the request.
        sequences: Its sequences, without media.
        images: The images behind digests.

    Raises:
        ValueError: The media are none, overlap, lie outside of their sequences, or were decided.
    """
    media_M4 = tensors.get("media_M4")
    if media_M4 is None:
        return list(sequences)
    digests = digests_in(tensors)
    if media_M4.dtype != torch.long or media_M4.ndim != 2 or media_M4.shape[1] != 4:
        raise ValueError("media_M4 is int64, [media, 4]")
    shown, found = images(digests), [list[Media]() for _ in sequences]
    rows: list[list[int]] = media_M4.tolist()
    for index, image, position, length in rows:
        if not (0 <= index < len(sequences) and 0 <= image < len(digests)):
            raise ValueError("media_M4 names a sequence or an image that is none")
        own, there = found[index], sequences[index]
        free = own[-1].position + own[-1].length if own else 0
        if length < 1 or not free <= position <= len(there) - length:
            raise ValueError("the media of a sequence overlap, are out of order, or lie outside of it")
        if bool(there.action_mask_L[position : position + length].any()):
            raise ValueError("tokens of an image are never decided")
        own.append(Media(digests[image], position, length, shown[image]))
    return [
        TokenSequence(own.tokens_L, own.action_mask_L, tuple(media))
        for own, media in zip(sequences, found, strict=True)
    ]
