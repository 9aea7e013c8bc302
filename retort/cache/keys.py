"""Keys of a cache: a key is a digest of all that a score depends on, so that nothing stale can be found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.teachers.base import ScoreRequest

#: Changes when what is stored under a key changes its meaning.
_VERSION = "1"


def states_key(fingerprint: str, sequence: TokenSequence) -> str:
    """The key of a model's hidden states at the decided tokens of a sequence.

    Args:
        fingerprint: `fingerprint_of` the model.
        sequence: What the model reads, in its own ids.

    Returns:
        Hex BLAKE2b of 20 bytes, as of all keys.

    Example:
        >>> from retort.cache.keys import states_key
        >>> from retort.core.sequences import TokenSequence
        >>> asked = TokenSequence.of([5, 6])
        >>> states_key("f", asked.then([7], decided=True)) == states_key("f", asked.then([8], decided=True))
        False
    """
    return _digest(["hidden states", fingerprint, ""], _parts([sequence]))


def signal_key(
    fingerprint: str,
    interpretation: str,
    sequences: Sequence[TokenSequence],
    tokens_A: Tensor,
    request: ScoreRequest,
    student_ids_AK: Tensor | None = None,
) -> str:
    """The key of a teacher's signal about one rollout.

    Args:
        fingerprint: `fingerprint_of` the teacher's model.
        interpretation: What else the teacher's numbers depend on, see `Read.interpretation`.
        sequences: What the teacher reads, in its own ids: its prompt, then the continuation.
        tokens_A: Ids of the decided tokens, the student's.
        request: Its needs and temperature count, and what they are about is in the sequences.
        student_ids_AK: The student's most likely ids at these steps, where the teacher is given them.
    """
    needs = sorted((need.kind, need.k, need.ids_of) for need in request.needs)
    words = ["signal", fingerprint, json.dumps([interpretation, needs, float(request.temperature).hex()])]
    given = [] if student_ids_AK is None else [_bytes(student_ids_AK)]
    return _digest(words, [*_parts(sequences), _bytes(tokens_A), *given])


def _parts(sequences: Iterable[TokenSequence]) -> Iterable[bytes]:
    for own in sequences:
        tokens, media = own.key
        yield from (tokens, _bytes(own.action_mask_L), json.dumps(media).encode())


def _digest(words: Sequence[str], parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=20)
    for part in (_VERSION.encode(), *(word.encode() for word in words), *parts):
        found.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts are one text
        found.update(part)
    return found.hexdigest()


def _bytes(values: Tensor) -> bytes:
    kept = values.detach().cpu().contiguous()
    shape = f"{kept.dtype} {tuple(kept.shape)}".encode()
    return shape + kept.reshape(-1).view(torch.uint8).numpy().tobytes()
