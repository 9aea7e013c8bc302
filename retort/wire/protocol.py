"""What `retort serve` and its clients say to one another: paths, the description of a model, sequences as tensors.

Everything that is large travels as safetensors. Axis letters: see `retort.core`; S is sequences, T all their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.sequences import TokenSequence
from retort.wire.media import as_tensors, placed_media

#: Of the protocol; a server and a client of different versions refuse each other.
VERSION = 2
HEALTH, ABOUT, FILES, HEAD = "/health", "/v1/retort", "/v1/tokenizer", "/v1/head"
HIDDEN, SCORE, GENERATE, IMAGES = "/v1/hidden", "/v1/score", "/v1/generate", "/v1/images"
#: Answer of a server that does not hold an image which a request names; a client sends it, and asks again.
LACKING = 424
#: Answer of a server whose weights are others than a request is about.
CONFLICT = 409
#: Type of a body of tensors.
TENSORS = "application/octet-stream"
#: Largest answer with a tokenizer, bytes.
MOST_FILES = 2**28
#: Bytes of a number, by the precision of a model.
BYTES = {"fp32": 4, "bf16": 2}


class About(BaseModel):
    """A model as its server describes it. A client takes nothing of it on trust that it can check.

    Attributes:
        protocol: Version of the protocol.
        version: Version of Retort.
        name: The model's name, for messages.
        precision: Of its weights and products, and so of its hidden states.
        attention: Its implementation of attention.
        vocab: Rows of the head.
        rows: Rows of the embedding.
        width: Of a hidden state.
        parameters: Their number.
        digest: Fingerprint of a sample of the weights, as `LanguageModel.digest`.
        weights: The same of every byte.
        scale, soft_cap: See `retort.core.head.Head`.
        stop, stops: Its primary stop token, and all of them.
        packs, shared_prefixes, together_up_to, rereads_from: See `retort.models.lm.LanguageModel`.
        rounded: How its weights were rounded in their file.
        most_tokens: Most tokens of one request.
        images: Whether it reads images.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    protocol: int
    version: str = Field(max_length=100)
    name: str = Field(max_length=1000)
    precision: Literal["fp32", "bf16"]
    attention: str = Field(max_length=100)
    vocab: int = Field(ge=1, lt=2**31)
    rows: int = Field(ge=1, lt=2**31)
    width: int = Field(ge=1, lt=2**24)
    parameters: int = Field(ge=0)
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    weights: str = Field(pattern="^[0-9a-f]{64}$")
    scale: float
    soft_cap: float | None
    stop: int = Field(ge=0)
    stops: list[int] = Field(min_length=1, max_length=10_000)
    packs: bool
    shared_prefixes: bool
    together_up_to: int | None
    rereads_from: int | None
    rounded: str = Field(max_length=1000)
    most_tokens: int = Field(ge=1)
    images: bool


def packed(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Sequences as tensors: all tokens end to end, which of them were decided, and the length of each sequence.

    Images among them are named by their digests, see `retort.wire.media`.
    """
    none = torch.zeros(0, dtype=torch.long)
    return {
        "tokens_T": torch.cat([none, *(own.tokens_L for own in sequences)]),
        "decided_T": torch.cat([none.bool(), *(own.action_mask_L for own in sequences)]).to(torch.uint8),
        "lengths_S": torch.tensor([len(own) for own in sequences], dtype=torch.long),
        **as_tensors(sequences),
    }


def unpacked(
    tensors: Mapping[str, Tensor], images: Callable[[Sequence[str]], Sequence[PromptImage]]
) -> list[TokenSequence]:
    """The sequences behind tensors of a client's, with the images behind the digests that they name.

    Raises:
        ValueError: They are none.
    """
    tokens_T, decided_T, lengths_S = (tensors.get(name) for name in ("tokens_T", "decided_T", "lengths_S"))
    if tokens_T is None or decided_T is None or lengths_S is None:
        raise ValueError("tokens_T, decided_T and lengths_S are needed")
    if tokens_T.dtype != torch.long or lengths_S.dtype != torch.long or decided_T.dtype != torch.uint8:
        raise ValueError("tokens_T and lengths_S are int64, decided_T is uint8")
    lengths: list[int] = lengths_S.flatten().tolist()
    total = len(tokens_T) if tokens_T.ndim == 1 else -1
    if tokens_T.shape != decided_T.shape or min(lengths, default=1) < 1 or sum(lengths) != total:
        raise ValueError("the lengths of tokens_T, decided_T and lengths_S disagree")
    if total and int(tokens_T.min()) < 0:
        raise ValueError("a token has an id below 0")
    parts = zip(tokens_T.split(lengths), decided_T.bool().split(lengths), strict=True)
    return placed_media(tensors, [TokenSequence(own_L, mask_L) for own_L, mask_L in parts], images)
