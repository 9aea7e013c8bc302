"""Cached bf16 weights of a model that computes in bf16: cast once, not for every token.

Under autocast a product casts its weights each time it is computed. torch caches a cast only of parameters that learn,
and never in inference mode: so a token cost a cast of the whole model. Here every weight that autocast casts is cast
when it has changed, and replaces the layer's own wherever no gradient is wanted. Weights that autocast does not cast
(embeddings, norms) stay as they are, so the numbers are the same to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class _Slot:
    """A layer's dictionary and name of a parameter, which is another object once ranks share the weights."""

    holder: dict[str, Any]
    name: str

    @property
    def parameter(self) -> Parameter:
        return self.holder[self.name]


@dataclass(frozen=True, eq=False)
class _Cast:
    """A parameter and its copy. The copy is outdated if the parameter's memory or version differs."""

    of: Parameter
    seen: tuple[int, int]
    copy: Parameter


class WorkingCopy:
    """The copies of one model's weights. None is written to: code that still holds one has the weights of its time."""

    def __init__(self) -> None:
        """Begins without copies; they are made on demand."""
        self._casts: dict[int, _Cast] = {}
        self._slots: tuple[Any, list[_Slot]] = (None, [])
        self._here = False

    @contextlib.contextmanager
    def in_place(self, model: Any, probe: Callable[[], Tensor]) -> Iterator[None]:
        """Puts the copies into the model's layers for the block. Enter it under autocast, where no gradient is wanted.

        Args:
            model: A model of transformers with fp32 weights.
            probe: Computes a number in which all weights take part, in fp32. It is computed once to see which weights
                are cast, and once with the copies: a family whose result differs keeps its weights.
        """
        if self._here:
            yield
            return
        self._find_slots(model, probe)
        with self._held(self._slots[1]):
            yield

    def drop(self, *, frozen: bool = True) -> None:
        """Frees the copies; without `frozen` only those of weights that learn.

        Raises:
            RuntimeError: They are in place, so results computed now would have no gradient.
        """
        if self._here:
            raise RuntimeError("gradients are wanted while copies replace the weights")
        self._casts = {} if frozen else {key: cast for key, cast in self._casts.items() if not cast.of.requires_grad}

    def bytes(self) -> tuple[int, int]:
        """Bytes of the copies once they are made: of weights that learn, freed while they do, and of frozen weights."""
        sizes = {id(p): (p.requires_grad, 2 * p.numel()) for p in (slot.parameter for slot in self._slots[1])}
        return sum(n for learns, n in sizes.values() if learns), sum(n for learns, n in sizes.values() if not learns)

    def _find_slots(self, model: Any, probe: Callable[[], Tensor]) -> None:
        """Finds by trying which weights have copies: once, and again when the model has got an adapter."""
        every = _every(model)
        known = (len(every), getattr(model.config, "_attn_implementation", None))
        if self._slots[0] == known:
            return
        torch.clear_autocast_cache()  # the probe would not see a cached cast
        with self._held([]), _Uses(every) as uses:
            expected = probe()
        slots = [slot for slot in every if uses.only_cast(slot.parameter)]
        try:
            with self._held(slots):
                same = torch.equal(probe(), expected)
        except Exception:  # a family may fail in any way on a weight that is not in fp32
            same = False
        if not same:
            self.drop()
        self._slots = (known, slots if same else [])

    @contextlib.contextmanager
    def _held(self, slots: Sequence[_Slot]) -> Iterator[None]:
        before = [slot.parameter for slot in slots]
        try:
            for slot, parameter in zip(slots, before, strict=True):
                slot.holder[slot.name] = self._of(parameter)
            self._here = True
            yield
        finally:
            self._here = False
            for slot, parameter in zip(slots, before, strict=True):
                slot.holder[slot.name] = parameter

    def _of(self, parameter: Parameter) -> Parameter:
        seen = (parameter.data_ptr(), parameter._version)  # pyright: ignore[reportPrivateUsage]
        cast = self._casts.get(id(parameter))
        if cast is None or cast.of is not parameter or cast.seen != seen:
            with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, in any mode
                copy = Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
            cast = self._casts[id(parameter)] = _Cast(parameter, seen, copy)
        return cast.copy


def _every(model: Any) -> list[_Slot]:
    return [
        _Slot(module._parameters, name)
        for module in model.modules()
        if not isinstance(module, Embedding)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    ]


class _Uses(TorchDispatchMode):
    """Records the uses of some parameters within the block: cast to bf16, or anything else.

    Views do not count, nor does an embedding lookup: an embedding is never copied, but its weight may be the head's,
        too.
    """

    def __init__(self, slots: Sequence[_Slot]) -> None:
        super().__init__()
        self._known = {_memory(slot.parameter) for slot in slots}
        self._cast: set[int] = set()
        self._other: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        used = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} & self._known
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if used and func is not torch.ops.aten.embedding.default and not {_memory(x) for x in made} & used:
            casts = func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
            (self._cast if casts and made[0].dtype == torch.bfloat16 else self._other).update(used)
        return out

    def only_cast(self, parameter: Parameter) -> bool:
        return _memory(parameter) in self._cast - self._other


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
