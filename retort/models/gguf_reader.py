"""Makes `gguf` read a file's header fast: its own reader takes minutes for the lists of a large vocabulary."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

#: Bytes before the first element of an array: the type of its elements and their number.
_BEFORE = 12


@contextlib.contextmanager
def fast_reader() -> Iterator[None]:
    """Lets transformers read files within the block by a fast reader, each once, and make no table twice."""
    package: Any = importlib.import_module("gguf")
    fast = {"GGUFReader": reader_class(), "get_tensor_name_map": package.get_tensor_name_map}
    plain = {name: getattr(package, name) for name in fast}
    for name, made in fast.items():
        setattr(package, name, lru_cache(maxsize=1)(made))
    try:
        yield
    finally:
        for name, made in plain.items():
            setattr(package, name, made)


@lru_cache
def reader_class() -> Any:
    """The reader of `gguf` with its two slow methods replaced; what it reads is the same."""
    import numpy as np

    package: Any = importlib.import_module("gguf")
    kinds, plain = package.GGUFValueType, package.GGUFReader

    class FastReader(plain):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            own = np.dtype(dtype).newbyteorder(override_order or self.byte_order)  # type: ignore[arg-type]
            return np.frombuffer(self.data, own, int(count), int(offset))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            count, inner = int(length[0]), kinds(int(kind[0]))
            types = [kinds.ARRAY, inner] if count else [kinds.ARRAY]
            start = int(orig_offs) + _BEFORE
            if inner == kinds.STRING:
                size, texts = self._texts(start, count)
                return _BEFORE + size, [kind, length, *texts], list(range(3, 3 + 2 * count, 2)), types
            values = self._get(start, self.gguf_scalar_to_np[inner], count)
            parts = [kind, length, *values.reshape(-1, 1)]
            return _BEFORE + values.nbytes, parts, list(range(2, 2 + count)), types

        def _texts(self, start: int, count: int) -> tuple[int, list[Any]]:
            """Bytes of that many texts, and each one's length and bytes."""
            found, place, data = list[Any](), start, self.data
            order = np.dtype(np.uint64).newbyteorder(self.byte_order)
            for _ in range(count):
                length = np.frombuffer(data, order, 1, place)
                size = int(length[0])
                found += (length, np.frombuffer(data, np.uint8, size, place + 8))
                place += 8 + size
            return place - start, found

    return FastReader
