"""Digests of a model's weights: a quick one of a sample, and one of every byte."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from retort.models.quantized import plain, sample
from retort.models.sharding import full


def sample_digest(lm: Any) -> str:
    """Hex SHA-256 over names, shapes and a sample of each of a `LanguageModel`'s weights."""
    found = hashlib.sha256()
    for name, parameter in (lm.weights() | lm.trainable()).items():
        found.update(f"{name} {tuple(parameter.shape)} {sample(full(parameter.detach()))}".encode())
    return found.hexdigest()


def whole_digest(lm: Any) -> str:
    """Hex SHA-256 over every byte of a `LanguageModel`'s weights and of the buffers that are saved."""
    saved = lm.model.state_dict().keys()
    buffers = {name: buffer for name, buffer in lm.model.named_buffers() if name in saved}
    found = hashlib.sha256()
    for name, tensor in (lm.weights() | lm.trainable() | buffers).items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in plain(tensor):
            found.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
