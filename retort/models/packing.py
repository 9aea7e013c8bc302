"""Sequences end to end in one row of a transformer, so that it computes nothing for padding. Axes: `retort.types`.

T is all tokens of a pack. Everything in a transformer but attention looks at one token at a time. Attention is kept
within the sequences by the two registries that transformers has for it: under the names here, the mask that a model
asks for is only described (`PackedMask`), and attention runs once for every run of sequences of the same length, as a
batch, by the implementation that the name stands for. So neither time nor memory grows with the square of the pack,
nothing is padded, and a family's own rules (sliding windows, chunks) are asked of the family's own mask.

A family that makes no masks through transformers, or whose layers carry a state along the row, would mix sequences.
`LanguageModel` finds that out by trying (`packs`), not by a list of names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Implementations that are wrapped. The flash kernels know packs by themselves, from position ids that restart.
WRAPPED = ("eager", "sdpa")
_PREFIX = "retort_"


@dataclass(frozen=True)
class Run:
    """Neighbours of the same length.

    Attributes:
        start: Their first token in the pack.
        count: How many.
        length: Tokens of each.
    """

    start: int
    count: int
    length: int


def runs(lengths: Sequence[int]) -> list[Run]:
    """The runs of a pack."""
    found, start = list[Run](), 0
    for length, group in groupby(lengths):
        found.append(Run(start, len(list(group)), length))
        start += found[-1].count * length
    return found


_packing: ContextVar[list[Run] | None] = ContextVar("packing", default=None)


@contextlib.contextmanager
def packed(lengths: Sequence[int]) -> Iterator[None]:
    """Within, a wrapped model is given one row that holds sequences of these lengths, end to end."""
    token = _packing.set(runs(lengths))
    try:
        yield
    finally:
        _packing.reset(token)


class PackedMask:
    """What a layer may attend to, described: it travels through the layers in the place of a mask."""

    def __init__(self, made: Callable[..., Tensor | None], given: dict[str, Any], parts: Sequence[Run]) -> None:
        """A mask of `parts`, to be made by transformers' function `made` of the arguments `given`."""
        self.parts = parts
        self._made, self._given = made, given
        self._found: dict[int, Tensor | None] = {}

    def of(self, run: Run) -> Tensor | None:
        """The mask [1, 1, L, L] of every sequence of a run; None for plain causal attention where that needs none."""
        if run.length not in self._found:
            window = self._given.get("local_size")
            # A pack is no reason to spell out a causal mask; custom functions, by which a family deviates from it, are.
            plain = not self._given.get("use_vmap", True) and (window is None or run.length <= window)
            given = {**self._given, "q_length": run.length, "kv_length": run.length, "allow_is_causal_skip": plain}
            if plain:
                given |= {"q_offset": 0, "kv_offset": 0, "local_size": None, "mask_function": causal_mask_function}
            else:  # the family's function knows the places in the pack, and counts from each sequence's start
                given |= {"q_offset": run.start, "kv_offset": run.start}
            self._found[run.length] = self._made(**given)
        return self._found[run.length]


def wrapped(implementation: str) -> str:
    """The name under which an implementation takes packs; others keep their own name."""
    if implementation not in WRAPPED:
        return implementation
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _attention(implementation))
        AttentionMaskInterface.register(name, _mask(implementation))
    return name


def _mask(implementation: str) -> Callable[..., Any]:
    made = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(*args: Any, **given: Any) -> Any:
        parts = _packing.get()
        return made(*args, **given) if parts is None else PackedMask(made, given, parts)

    return mask


def _attention(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A family's eager attention lives beside its layers, under a name that is the same in all of transformers.
        owner = sys.modules[type(module).__module__]
        inner: Any = ALL_ATTENTION_FUNCTIONS.get(implementation) or owner.eager_attention_forward
        if not isinstance(attention_mask, PackedMask):
            return inner(module, query, key, value, attention_mask, *args, **more)
        # `split`, not slices: the gradient of a slice is as large as the pack.
        sizes = [run.count * run.length for run in attention_mask.parts]
        parts = zip(attention_mask.parts, *(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
        found = [
            inner(module, *(_batch(states, run) for states in own), attention_mask.of(run), *args, **more)[0]
            for run, *own in parts
        ]
        return torch.cat([part.flatten(0, 1) for part in found])[None], None

    return attention


def _batch(states: Tensor, run: Run) -> Tensor:
    """[1, H, count * L, D] -> [count, H, L, D], without a copy."""
    return states[0].unflatten(1, (run.count, run.length)).transpose(0, 1)
