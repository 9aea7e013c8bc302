"""The weights of a model that computes in bf16, cast once and not anew for every token.

Under autocast a product casts its weights each time it is computed. torch remembers a cast only of what learns, and
never in inference mode: so a token cost a cast of the whole model. Here every weight that autocast casts is cast when
it has changed, and stands in its layer's place wherever no gradient is wanted. What autocast does not cast (embeddings,
norms) stays as it is, so the numbers are the same to the last bit.
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
class _Place:
    """Where a layer keeps a parameter."""

    holder: dict[str, Any]
    name: str
    parameter: Parameter


@dataclass(frozen=True, eq=False)
class _Cast:
    """A parameter and its copy. Other memory, or a later version, is another value."""

    of: Parameter
    seen: tuple[int, int]
    copy: Parameter


class WorkingCopy:
    """The copies of one model's weights. None is ever written to: who still holds one sees the weights as they were."""

    def __init__(self) -> None:
        """No copies yet; they are made when they are first wanted."""
        self._casts: dict[int, _Cast] = {}
        self._places: tuple[Any, list[_Place]] = (None, [])
        self._here = False

    @contextlib.contextmanager
    def in_place(self, model: Any, probe: Callable[[], Tensor]) -> Iterator[None]:
        """Within, the model's layers hold the copies. To be entered under autocast, and where no gradient is wanted.

        Args:
            model: Of transformers, its weights fp32.
            probe: Computes something in which all weights take part, in fp32. It is computed once to see which weights
                are cast, and once with the copies: a family that changes with them keeps its weights.
        """
        if self._here:
            yield
            return
        self._look(model, probe)
        with self._held(self._places[1]):
            yield

    def drop(self, *, frozen: bool = True) -> None:
        """Frees the copies; without `frozen` only those of what learns.

        Raises:
            RuntimeError: They are in place: what is computed now would have no gradient.
        """
        if self._here:
            raise RuntimeError("gradients are wanted where copies stand in the place of the weights")
        self._casts = {} if frozen else {key: cast for key, cast in self._casts.items() if not cast.of.requires_grad}

    def bytes(self) -> tuple[int, int]:
        """What they take once they are made: of what learns, which are freed while it does, and of what is frozen."""
        sizes = {id(p): (p.requires_grad, 2 * p.numel()) for p in (place.parameter for place in self._places[1])}
        return sum(n for learns, n in sizes.values() if learns), sum(n for learns, n in sizes.values() if not learns)

    def _look(self, model: Any, probe: Callable[[], Tensor]) -> None:
        """Finds by trying which weights have copies: once, and again where the model has an adapter since."""
        every = _every(model)
        known = (len(every), getattr(model.config, "_attn_implementation", None))
        if self._places[0] == known:
            return
        torch.clear_autocast_cache()  # a cast that is remembered would not be seen
        with self._held([]), _Uses(every) as uses:
            expected = probe()
        places = [place for place in every if uses.only_cast(place.parameter)]
        try:
            with self._held(places):
                same = torch.equal(probe(), expected)
        except Exception:  # whatever a family does with a weight that is not in fp32
            same = False
        if not same:
            self.drop()
        self._places = (known, places if same else [])

    @contextlib.contextmanager
    def _held(self, places: Sequence[_Place]) -> Iterator[None]:
        try:
            for place in places:
                place.holder[place.name] = self._of(place.parameter)
            self._here = True
            yield
        finally:
            self._here = False
            for place in places:
                place.holder[place.name] = place.parameter

    def _of(self, parameter: Parameter) -> Parameter:
        seen = (parameter.data_ptr(), parameter._version)  # pyright: ignore[reportPrivateUsage]
        cast = self._casts.get(id(parameter))
        if cast is None or cast.of is not parameter or cast.seen != seen:
            with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, whoever asks first
                copy = Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
            cast = self._casts[id(parameter)] = _Cast(parameter, seen, copy)
        return cast.copy


def _every(model: Any) -> list[_Place]:
    return [
        _Place(module._parameters, name, parameter)
        for module in model.modules()
        if not isinstance(module, Embedding)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    ]


class _Uses(TorchDispatchMode):
    """What is done with some parameters within: cast to bf16, or anything else.

    Views are neither, nor is looking up a row: an embedding is never copied, but its weight may be the head's as well.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        super().__init__()
        self._known = {_memory(place.parameter) for place in places}
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
