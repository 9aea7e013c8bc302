"""Weights of a frozen model that are on its device only while it computes.

Its layers and its embedding leave. The head stays, because a signal reads it when the loss is computed. A weight that
is away is a tensor on PyTorch's meta device: it keeps its shape, and no number can be computed with it.

Whoever runs the model need not know of it. A pass brings the weights back, and they leave after it, or at the end of
`Offload.kept`, where several passes follow one another. They are whole for a pass, not moved layer by layer: a
generated token is a pass, too, and would read the model again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from retort.errors import UserError
from retort.models.weight_files import weight_files

#: Bytes at whose multiples a weight begins in memory, as torch has it: products may be computed otherwise elsewhere.
_ALIGNED = 64
#: Where the weights of a frozen model wait: in the memory of the host, or in the model's own files.
Storage = Literal["cpu", "disk"]


class Room:
    """The place that several models take in turn: the weights of one are here at a time."""

    def __init__(self) -> None:
        """It is empty."""
        self.taken_by: Offload | None = None


class Waiting(Protocol):
    """Where weights wait."""

    def read(self) -> Iterator[Tensor]:
        """Copies of all of them on the model's device, in the order of their names."""
        ...


@dataclass(frozen=True, eq=False)
class _Slot:
    """A weight: the layers' dictionaries that hold it, its name there, and what stands for it while it is away."""

    holders: Sequence[tuple[dict[str, Any], str]]
    away: Parameter

    def put(self, parameter: Parameter) -> None:
        for holder, name in self.holders:
            holder[name] = parameter


class Offload:
    """When a frozen model's weights are on its device. Until `begin` they always are."""

    def __init__(self) -> None:
        """Nothing leaves yet."""
        self.storage: Storage | None = None
        self.bytes = 0
        self.device: torch.device | None = None
        self.reads = 0
        self._slots: list[_Slot] = []
        self._waiting: Waiting | None = None
        self._room = Room()
        self._kept = 0

    @property
    def here(self) -> bool:
        """Whether all weights are on the device now."""
        return self._waiting is None or self._room.taken_by is self

    @property
    def words(self) -> str:
        """Where the weights wait, for the summary; empty where they always are on the device."""
        where = {"cpu": "in the memory of the host", "disk": "in its files"}
        return f"{where[self.storage]} between passes" if self.storage else ""

    def begin(
        self, model: Any, staying: Collection[Tensor], storage: Storage, waiting: Callable[..., Waiting], room: Room
    ) -> None:
        """Has the weights leave, now and after each pass.

        Args:
            model: Of transformers; changed in place.
            staying: Weights that stay: the head's.
            storage: Where the others wait.
            waiting: Makes what gives them back, of their names and values.
            room: What the model shares with others of which one is to be here at a time.

        Raises:
            UserError: They cannot be had back as they are.
        """
        kept = {id(weight) for weight in staying}
        base = model.base_model
        leaving = {name: own for name, own in base.named_parameters() if id(own) not in kept}
        self._waiting = waiting(leaving)
        held: dict[int, list[tuple[dict[str, Any], str]]] = {id(own): [] for own in leaving.values()}
        for module in base.modules():
            for name, own in module._parameters.items():
                if id(own) in held:
                    held[id(own)].append((module._parameters, name))
        self._slots = [
            _Slot(held[id(own)], Parameter(torch.empty_like(own, device="meta"), requires_grad=False))
            for own in leaving.values()
        ]
        self.storage, self.device, self._room = storage, model.device, room
        self.bytes = sum(own.numel() * own.element_size() for own in leaving.values())
        base.register_forward_pre_hook(lambda *_: self._come())
        base.register_forward_hook(lambda *_: None if self._kept else self._leave(), always_call=True)
        self._leave()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within, the weights stay from the first pass on."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1
            if not self._kept:
                self._leave()

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Within, the weights are on the device, for those who read them without a pass."""
        with self.kept():
            self._come()
            yield

    def _come(self) -> None:
        if self._waiting is None or self.here:
            return
        if self._room.taken_by is not None:
            self._room.taken_by._leave()
        try:
            with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, in any mode
                for slot, weight in zip(self._slots, self._waiting.read(), strict=True):
                    slot.put(Parameter(weight, requires_grad=False))
        except BaseException:
            self._leave()
            raise
        self.reads += 1
        self._room.taken_by = self

    def _leave(self) -> None:
        for slot in self._slots:
            slot.put(slot.away)
        if self._room.taken_by is self:
            self._room.taken_by = None


class InHost:
    """Weights that wait in the memory of the host, pinned where the device can read it then."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Copies them there.

        Args:
            weights: By name, on the device.
        """
        self._devices = [weight.device for weight in weights.values()]
        copies = [weight.detach().to("cpu", copy=True) for weight in weights.values()]
        pins = torch.cuda.is_available() and any(device.type == "cuda" for device in self._devices)
        self._copies = [copy.pin_memory() for copy in copies] if pins else copies

    def read(self) -> Iterator[Tensor]:
        """See `Waiting`."""
        for copy, device in zip(self._copies, self._devices, strict=True):
            yield copy.to(device, non_blocking=True, copy=True)


@dataclass(frozen=True)
class _Kept:
    """Where a weight is in a model's files, and what it is made on the device."""

    file: Path
    key: str
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class InFiles:
    """Weights that wait in the files that they were loaded from. Every one was compared with what is read there."""

    def __init__(self, label: str, location: str, weights: Mapping[str, Tensor]) -> None:
        """Finds them in the files.

        Args:
            label: Role and name of the model, for messages.
            location: Its folder, or its hub name.
            weights: By name, as they are on the device.

        Raises:
            UserError: A weight is not in the files as the model holds it.
        """
        self._label = label
        self._files = {file: _state(file) for file in weight_files(location)}
        with self._opened() as files:
            keys = [(file, str(key)) for file, opened in files.items() for key in opened.keys()]  # noqa: SIM118
            self._places = [self._find(name, weight, keys, files) for name, weight in weights.items()]

    def _find(self, name: str, weight: Tensor, keys: Sequence[tuple[Path, str]], files: Mapping[Path, Any]) -> _Kept:
        # A name in the files may begin otherwise: a text model may be part of a larger one, or its parts were renamed.
        alike = [(_common(key, name), file, key) for file, key in keys]
        least = min(2, name.count(".") + 1)
        for _, file, key in sorted((own for own in alike if own[0] >= least), key=lambda own: -own[0]):
            place = _Kept(file, key, weight.dtype, weight.device, weight.shape)
            if tuple(files[file].get_slice(key).get_shape()) == weight.shape and _same(_of(place, files), weight):
                return place
        raise UserError(
            f"{self._label}: offload = disk needs every weight in its files as the model holds it, and '{name}' is "
            "not: that family makes it of others when it is loaded; set offload=cpu on a GPU, or leave it out"
        )

    def read(self) -> Iterator[Tensor]:
        """See `Waiting`.

        Raises:
            UserError: A file was changed since the model was loaded, or is gone.
        """
        with self._opened() as files:
            if not self._places or self._places[0].device.type != "cpu":
                yield from (_of(place, files) for place in self._places)
                return
            # In one piece of memory, which goes back to the system when they leave; small ones may stay in the heap.
            sizes = [place.bytes for place in self._places]
            starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
            whole = torch.empty(starts[-1], dtype=torch.uint8)
            for place, start, size in zip(self._places, starts, sizes, strict=False):
                own = whole[start : start + size].view(place.dtype).view(place.shape)
                yield own.copy_(files[place.file].get_tensor(place.key))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Mapping[Path, Any]]:
        from safetensors import SafetensorError, safe_open

        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            for file, before in self._files.items():
                try:
                    now = _state(file)
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise UserError(f"{self._label}: {file} cannot be read any more: {error}; put it back") from None
                if now != before:
                    raise UserError(f"{self._label}: {file} was changed since it was loaded; put back what it was")
            yield files


def _common(one: str, other: str) -> int:
    """How many parts at the end of two names are the same."""
    parts = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _of(place: _Kept, files: Mapping[Path, Any]) -> Tensor:
    """A copy of a weight: what safetensors gives may be the file itself."""
    return files[place.file].get_tensor(place.key).to(place.device, place.dtype, copy=True)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit."""
    if one.shape != other.shape:
        return False
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)
