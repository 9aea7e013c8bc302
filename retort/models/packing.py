"""Sequences end to end in one row of a transformer, so that it computes nothing for padding. Axes: `retort.core`.

T is all tokens of a pack. Everything in a transformer but attention looks at one token at a time. Attention is kept
within the sequences by the two registries that transformers has for it: under the names here, the mask that a model
asks for is only described (`PackedMask`), and attention runs once for every run of sequences of the same length, as a
batch, by the implementation that the name stands for. So neither time nor memory grows with the square of the pack,
nothing is padded, and a family's own rules (sliding windows, chunks) are asked of the family's own mask.

Sequences that begin with the same prompt (the same tokens and the same media) share its place in the row: what a token
is in every layer depends only on those before it, so all layers compute a prompt once, and attention alone sees every
sequence written out in full (F is all of their tokens). That holds where attention is plainly causal; a window or a
chunk counts places in the row.

A family that makes no masks through transformers, or whose layers carry a state along the row, would mix sequences.
`LanguageModel` finds that out by trying (`packs`, `shares`), not by a list of names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retort.core.sequences import TokenSequence

#: Implementations that are wrapped. The flash kernels know packs by themselves, from position ids that restart.
WRAPPED = ("eager", "sdpa")
_PREFIX = "retort_"


@dataclass(frozen=True)
class Run:
    """Neighbours of the same length.

    Attributes:
        start: Where the first token of the first stands, of all tokens of the sequences.
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


@dataclass(frozen=True, eq=False)
class Row:
    """Sequences, end to end.

    Attributes:
        tokens_T: Ids.
        position_T: Place of each token in its own sequence.
        decided_N: Place in the row of the token before every decided one, sequences in the order they were given in.
        parts: The sequences, as attention sees them.
        place_F: Place in the row of every token of every sequence; None where these are the row itself.
        first_T: Where in F a token of the row stands first; None with `place_F`.
    """

    tokens_T: Tensor
    position_T: Tensor
    decided_N: Tensor
    parts: list[Run]
    place_F: Tensor | None = None
    first_T: Tensor | None = None

    @staticmethod
    def of(sequences: Sequence[TokenSequence], *, share: bool, device: torch.device) -> Row:
        """Lays sequences into a row.

        Shortest first, so that runs are long. Tokens behind a sequence's last decision decide nothing and are left out.
        """
        places = [sequence.action_mask_L.nonzero().squeeze(1) for sequence in sequences]
        ends = [int(place_A[-1]) if len(place_A) else 1 for place_A in places]
        order = sorted(range(len(sequences)), key=lambda i: (ends[i], i))
        prompts: dict[object, int] = {}
        ids, position, place, first, starts = list[Tensor](), list[range](), list[range](), list[range](), {}
        wide = full = 0  # tokens of the row, and of all sequences, so far
        for i in order:
            end, starts[i] = ends[i], full
            fresh = 0  # the first token that is not in the row yet
            if share and len(places[i]):
                prompt = sequences[i].start
                start = prompts.setdefault(sequences[i].prefix_key, wide)
                fresh = prompt if start != wide else 0
                place.append(range(start, start + fresh))
            ids.append(sequences[i].tokens_L[fresh:end])
            position.append(range(fresh, end))
            place.append(range(wide, wide + end - fresh))
            first.append(range(full + fresh, full + end))
            wide, full = wide + end - fresh, full + end
        place_F = _joined(place)
        decided = [place_A + (starts[i] - 1) for i, place_A in enumerate(places)]
        return Row(
            torch.cat(ids).to(device),
            _joined(position).to(device),
            place_F[torch.cat(decided)].to(device),
            runs([ends[i] for i in order]),
            place_F.to(device) if wide < full else None,
            _joined(first).to(device) if wide < full else None,
        )

    def spread(self, states: Tensor) -> Tensor:
        """States of the row, [1, H, T, D], for every sequence in full, [1, H, F, D]."""
        if self.place_F is None:
            return states
        # An embedding, because its gradient adds up duplicates quickly, and always in the same order.
        states_FE = functional.embedding(self.place_F, states[0].transpose(0, 1).flatten(1))
        return states_FE.unflatten(1, (states.shape[1], states.shape[3])).transpose(0, 1)[None]

    def gathered(self, states_F: Tensor) -> Tensor:
        """What attention found for the sequences, [F, ...], back in the row, [T, ...]."""
        return states_F if self.first_T is None else states_F.index_select(0, self.first_T)


def _joined(ranges: Sequence[range]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(ranges)), dtype=torch.long)


def row_batches(sequences: Sequence[TokenSequence], budget: int, *, share: bool) -> list[list[int]]:
    """Indices of sequences, cut into rows of at most `budget` tokens (or one sequence).

    Shortest first, so that neighbours are alike; where prompts are shared, sequences with the same one are neighbours.
    """
    lengths = [len(sequence) for sequence in sequences]
    prompts: list[object] = list(range(len(sequences)))
    shared = [0] * len(sequences)
    if share:
        for i, sequence in enumerate(sequences):
            if sequence.steps:
                shared[i], prompts[i] = sequence.start, sequence.prefix_key
    longest: dict[object, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    names = {prompt: number for number, prompt in enumerate(longest)}
    batches: list[list[int]] = []
    filled, before = 0, None
    for i in sorted(range(len(sequences)), key=lambda i: (longest[prompts[i]], names[prompts[i]], lengths[i], i)):
        filled += lengths[i] - (shared[i] if prompts[i] == before else 0)
        if not batches or filled > budget:
            batches.append([])
            filled = lengths[i]
        batches[-1].append(i)
        before = prompts[i]
    return batches


class CannotShareError(Exception):
    """A layer may not attend to everything before a token, and would count the distance in the row."""


_packing: ContextVar[Row | None] = ContextVar("packing", default=None)


@contextlib.contextmanager
def packed(row: Row) -> Iterator[None]:
    """Within, a wrapped model is given this row."""
    token = _packing.set(row)
    try:
        yield
    finally:
        _packing.reset(token)


class PackedMask:
    """What a layer may attend to, described: it travels through the layers in the place of a mask."""

    def __init__(self, made: Callable[..., Tensor | None], given: dict[str, Any], row: Row) -> None:
        """A mask of a row's sequences, to be made by transformers' function `made` of the arguments `given`."""
        if row.place_F is not None and (given.get("use_vmap", True) or given.get("local_size") is not None):
            raise CannotShareError
        self.row = row
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
        row = _packing.get()
        return made(*args, **given) if row is None else PackedMask(made, given, row)

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
        row = attention_mask.row
        # `split`, not slices: the gradient of a slice is as large as the pack.
        sizes = [run.count * run.length for run in row.parts]
        parts = zip(row.parts, *(row.spread(states).split(sizes, dim=2) for states in (query, key, value)), strict=True)
        found = [
            inner(module, *(_batch(states, run) for states in own), attention_mask.of(run), *args, **more)[0]
            for run, *own in parts
        ]
        return row.gathered(torch.cat([part.flatten(0, 1) for part in found]))[None], None

    return attention


def _batch(states: Tensor, run: Run) -> Tensor:
    """[1, H, count * L, D] -> [count, H, L, D], without a copy."""
    return states[0].unflatten(1, (run.count, run.length)).transpose(0, 1)
