"""Tensors in files: of one process whole, of several ranks each its slices; both are read by any number of ranks.

Several ranks write through `torch.distributed.checkpoint` (DCP), in its form that is safetensors: the header of a
rank's file says where each slice begins in its tensor. Nobody holds the whole of a model, neither to write nor to read.
"""

# pyright: basic
from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.ranks import here

#: A rank's tensors are copied once while they are written, one file of at most so many bytes after another.
_FILE_BYTES = 2**30


def save_slices(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of several ranks; all call it together, and each writes its slices. Rank 0 writes what is whole.

    Args:
        folder: Of the files, which begin with `shard-R`, where R is the rank's number from 1 on in five digits.
        tensors: The same names on all ranks.

    Raises:
        OSError: Some rank could not write.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if not tensors:
        return
    writer = HuggingFaceStorageWriter(str(folder), _files_of(tensors), save_distributed=True)
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    with _plain_errors():
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer, planner=planner)


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1 on, into which each rank writes its slice of a tensor."""
    found: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // here().size
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        found[name], filled = number, filled + size
    return found


class Stored(Mapping[str, Tensor]):
    """Tensors in files, by name; a value is read whole when it is asked for, and not kept.

    Attributes:
        shapes: Of the whole tensors, by name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the files' headers.

        Args:
            files: All files of these tensors: one that holds them whole, those of several ranks, or none.

        Raises:
            OSError: A file cannot be read.
            ValueError: The files do not hold whole tensors.
        """
        self._reader = _reader(files) if files else None
        entries = self._reader.read_metadata().state_dict_metadata if self._reader else {}
        self.shapes: dict[str, torch.Size] = {name: entry.size for name, entry in entries.items()}
        self._dtypes: dict[str, torch.dtype] = {name: entry.properties.dtype for name, entry in entries.items()}
        for name, entry in entries.items():
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ValueError(f"a slice of '{name}' is missing")

    def __getitem__(self, name: str) -> Tensor:
        found = torch.empty(self.shapes[name], dtype=self._dtypes[name])
        self._read({name: found})
        return found

    def whole(self) -> dict[str, Tensor]:
        """All of them, read at once: each value by itself takes milliseconds, however small it is."""
        found = {name: torch.empty(shape, dtype=self._dtypes[name]) for name, shape in self.shapes.items()}
        self._read(dict(found))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def empty(self, name: str, parameter: Tensor) -> Tensor:
        """A tensor to read one of these into: spread over ranks as a parameter is, where it has the parameter's shape.

        Args:
            name: Of the stored tensor.
            parameter: Whose device and slices it gets.
        """
        shape, dtype = self.shapes[name], self._dtypes[name]
        if shape == parameter.shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Reads stored tensors into others of the same names and shapes. All ranks call it; each reads its slices.

        Raises:
            OSError: A file cannot be read.
        """
        self._read({name: target.detach() for name, target in targets.items()})

    def _read(self, targets: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        if targets and self._reader is not None:
            with _plain_errors(), warnings.catch_warnings():
                # Each rank plans for itself what it reads, so nothing is exchanged.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(targets, storage_reader=self._reader, no_dist=True)


def _reader(files: Sequence[Path]) -> Any:
    """DCP's reader of safetensors for some files, of which it reads the headers once."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    class Listed(FileSystem):
        def ls(self, path: str | Any) -> list[str]:
            return [str(file) for file in files]

    class Reader(HuggingFaceStorageReader):
        def read_metadata(self) -> Any:
            return known

    reader = Reader(str(files[0].parent))
    reader.fs = Listed()
    known = HuggingFaceStorageReader.read_metadata(reader)
    return reader


class _plain_errors:
    """Raises what a rank raised in DCP instead of DCP's collection of them, which is no `Exception`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        if isinstance(error, CheckpointException):
            first, _ = error.failures[min(error.failures)]
            raise first from None
