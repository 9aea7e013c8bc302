"""A machine without a GPU that pretends to have one: real numbers, and the mistakes of placement that CUDA refuses.

Tensors stay where they are, on the CPU. What was asked for on `cuda` is remembered by its memory, `tensor.device` says
so, and an operation that mixes both sides is refused as CUDA refuses it. So a whole run can be tried, and its numbers
compared with those of the CPU. What a GPU computes, how it rounds, its kernels, its memory and its streams are not
pretended; nor is a 0-dimensional tensor of the CPU refused where only some operations would.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda"), torch.device("cpu")
_aten = torch.ops.aten
#: Which may have some arguments on the other side.
_CROSSES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXES = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
#: Whose result's size, or whose result, is known only when the GPU is done.
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}


class Misplaced(RuntimeError):
    """What CUDA would have refused."""


class Pretended(TorchDispatchMode):
    """Within `on`, there is a GPU.

    Attributes:
        waits: How often the CPU waited for it, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._there: dict[int, torch.UntypedStorage] = {}  # held, so that no memory is given to another

    def place(self, tensor: Tensor, device: torch.device) -> None:
        """Says where a tensor's memory is."""
        storage = tensor.untyped_storage()
        if device.type == "cuda":
            self._there[storage._cdata] = storage

    def there(self, tensor: Any) -> bool:
        """Whether a tensor is on the GPU."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [self.there(x) for x in tensors]
        if any(there) and not all(there):
            self._check(func, args, tensors, there)
        masks = func in _INDEXES and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        if any(there) and (func in _WAITS or masks):
            self.waits[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        if there and (there[0] if func in _INDEXES | _CROSSES else any(there)):
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self.place(made, GPU)
        return out

    def _check(self, func: Any, args: Any, tensors: list[Tensor], there: list[bool]) -> None:
        if func in _CROSSES:
            return
        others = [x for x, here in zip(tensors, there, strict=True) if not here]
        if func in _INDEXES and there[0]:  # places may be named from either side
            others = [x for x in others if all(x is not index for index in tree_leaves(args[1]))]
        if any(x.ndim for x in others):
            raise Misplaced(f"{func}: Expected all tensors to be on the same device, but found at least two devices")


class _Asked(TorchFunctionMode):
    """What Python asks for: devices by name, moves, and where something is."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self.pretended = pretended

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return GPU if self.pretended.there(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.pretended.there(args[0])
        if name in ("tolist", "numpy") and self.pretended.there(args[0]):
            if name == "numpy":
                raise Misplaced("can't convert cuda device type tensor to numpy; use Tensor.cpu() first")
            self.pretended.waits["tolist"] += 1
        moves = func in (Tensor.to, Tensor.cpu, Tensor.cuda)
        asked = [_device(x) for x in [*args[1 if moves else 0 :], kwargs.get("device")]]
        wanted = next((x for x in asked if x is not None), None)
        wanted = CPU if func is Tensor.cpu else GPU if func is Tensor.cuda else wanted
        if moves and wanted is None and len(args) > 1 and isinstance(args[1], Tensor):
            wanted = GPU if self.pretended.there(args[1]) else CPU
        if wanted is None or func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if wanted.type == "cuda" and generator is not None:
            raise Misplaced("Expected a 'cuda' device type for generator but found 'cpu'")
        args, kwargs = tree_map(lambda x: CPU if _device(x) is not None else x, (args, kwargs))
        if not moves:
            made = func(*args, **kwargs)
            for x in tree_leaves(made):
                if isinstance(x, Tensor):
                    self.pretended.place(x, wanted)
            return made
        return self._moved(func, args, kwargs, wanted)

    def _moved(self, func: Any, args: Any, kwargs: Any, wanted: torch.device) -> Tensor:
        here = self.pretended.there(args[0])
        made = args[0] if func in (Tensor.cpu, Tensor.cuda) else func(*args, **kwargs)
        if here == (wanted.type == "cuda"):
            return made
        self.pretended.waits["to the CPU"] += here
        copy = torch.empty(made.shape, dtype=made.dtype)
        self.pretended.place(copy, wanted)
        return _Move.apply(copy, made) if made.requires_grad and torch.is_grad_enabled() else copy.copy_(made)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copy: Tensor, source: Tensor) -> Tensor:
        ctx.like = source.detach()
        ctx.mark_dirty(copy)
        return copy.copy_(source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient.to(ctx.like.device)


def _device(x: Any) -> torch.device | None:
    name = x.type if isinstance(x, torch.device) else x.partition(":")[0] if isinstance(x, str) else None
    return {"cuda": GPU, "cpu": CPU}.get(name or "")


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """A GPU for the length of the block; autocast for it is that of the CPU, whose products these are."""
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch.setattr(torch, "is_autocast_enabled", lambda device_type="cpu": enabled("cpu"))
        patch.setattr(torch, "get_autocast_dtype", lambda device_type: dtype("cpu"))
        mode = Pretended()
        with mode, _Asked(mode):
            yield mode
