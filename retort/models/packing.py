"""Sequences end to end in one row of a transformer, so that it computes nothing for padding. Axes: `retort.core`.

T is all tokens of a row. Everything in a transformer but attention processes one token at a time. Attention is kept
within the sequences by the two registries that transformers has for it. Under the names here, the mask that a model
asks for is only described (`PackedMask`). Attention runs once for every run of sequences of the same length, as a
batch, by the implementation that the name stands for. So neither time nor memory grows with the square of the row,
nothing is padded, and a family's own rules (sliding windows, chunks) come from the family's own mask.

Sequences that begin with the same prompt (the same tokens and the same media) share its tokens in the row. A token's
states depend only on the tokens before it, so all layers compute a prompt once, and attention alone sees every sequence
in full (F is all of their tokens). That holds where attention is plainly causal; a window or a chunk counts positions
in the row.

A family that makes no masks through transformers, or whose layers carry a state along the row, would mix sequences.
`LanguageModel` finds that out by trying (`packs`, `shared_prefixes`), not by a list of names.
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

#: Implementations that are wrapped. The flash kernels detect packed rows themselves, from position ids that restart.
WRAPPED = ("eager", "sdpa")
_PREFIX = "retort_"


@dataclass(frozen=True)
class Run:
    """A run of neighbouring sequences of the same length.

    Attributes:
        start: Index of the first token of the first sequence among all tokens of the sequences.
        count: Number of sequences.
        length: Tokens of each sequence.
    """

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Laid:
    """The tokens of a sequence that a row holds: from `start` to before `end`, of the sequence `index`."""

    index: int
    start: int
    end: int


def runs(lengths: Sequence[int]) -> list[Run]:
    """The runs of equal lengths in a row."""
    found, start = list[Run](), 0
    for length, group in groupby(lengths):
        found.append(Run(start, len(list(group)), length))
        start += found[-1].count * length
    return found


@dataclass(frozen=True, eq=False)
class Row:
    """Sequences, end to end in one row.

    Attributes:
        tokens_T: Ids of the row.
        position_T: Position of each token in its own sequence.
        decided_N: Index in the row of the token before every decided one, sequences in the order they were given in.
        parts: The sequences, as attention sees them.
        laid: Which tokens of which sequence the row holds, in order.
        index_F: Index in the row of every token of every sequence; None where these are the row itself.
        first_T: Index in F of a token's first occurrence; None with `index_F`.
    """

    tokens_T: Tensor
    position_T: Tensor
    decided_N: Tensor
    parts: list[Run]
    laid: list[Laid]
    index_F: Tensor | None = None
    first_T: Tensor | None = None

    @staticmethod
    def of(sequences: Sequence[TokenSequence], *, share: bool, device: torch.device) -> Row:
        """Lays sequences into a row.

        The shortest come first, so that runs are long. Tokens after a sequence's last decision are left out.
        """
        decided_at = [sequence.action_mask_L.nonzero().squeeze(1) for sequence in sequences]
        ends = [int(decided_A[-1]) if len(decided_A) else 1 for decided_A in decided_at]
        order = sorted(range(len(sequences)), key=lambda i: (ends[i], i))
        prompts: dict[object, int] = {}
        index, first, starts, laid = list[range](), list[range](), dict[int, int](), list[Laid]()
        wide = full = 0  # tokens of the row, and of all sequences, so far
        for i in order:
            end, starts[i] = ends[i], full
            fresh = 0  # the first token that is not in the row yet
            if share and len(decided_at[i]):
                prompt = sequences[i].start
                start = prompts.setdefault(sequences[i].prefix_key, wide)
                fresh = prompt if start != wide else 0
                index.append(range(start, start + fresh))
            laid.append(Laid(i, fresh, end))
            index.append(range(wide, wide + end - fresh))
            first.append(range(full + fresh, full + end))
            wide, full = wide + end - fresh, full + end
        index_F = _joined(index)
        decided = [decided_A + (starts[i] - 1) for i, decided_A in enumerate(decided_at)]
        return Row(
            torch.cat([sequences[own.index].tokens_L[own.start : own.end] for own in laid]).to(device),
            _joined([range(own.start, own.end) for own in laid]).to(device),
            index_F[torch.cat(decided)].to(device),
            runs([ends[i] for i in order]),
            laid,
            index_F.to(device) if wide < full else None,
            _joined(first).to(device) if wide < full else None,
        )

    def spread(self, states: Tensor) -> Tensor:
        """Spreads states of the row, [1, H, T, D], over every sequence in full, [1, H, F, D]."""
        if self.index_F is None:
            return states
        # An embedding, because its gradient adds up duplicates quickly, and always in the same order.
        states_FE = functional.embedding(self.index_F, states[0].transpose(0, 1).flatten(1))
        return states_FE.unflatten(1, (states.shape[1], states.shape[3])).transpose(0, 1)[None]

    def gathered(self, states_F: Tensor) -> Tensor:
        """Gathers the sequences' outputs of attention, [F, ...], back to the row, [T, ...]."""
        return states_F if self.first_T is None else states_F.index_select(0, self.first_T)


def _joined(ranges: Sequence[range]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(ranges)), dtype=torch.long)


def row_batches(sequences: Sequence[TokenSequence], budget: int, *, share: bool) -> list[list[int]]:
    """Indices of sequences, cut into rows of at most `budget` tokens (or one sequence).

    The shortest come first, so that neighbours are alike; where prompts are shared, the same prompts are neighbours.
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
    """A layer may not attend to everything before a token, and would measure distances in the row."""


_packing: ContextVar[Row | None] = ContextVar("packing", default=None)


@contextlib.contextmanager
def packed(row: Row) -> Iterator[None]:
    """Gives this row to a wrapped model for the block."""
    token = _packing.set(row)
    try:
        yield
    finally:
        _packing.reset(token)


class PackedMask:
    """A description of what a layer may attend to, which travels through the layers instead of a mask."""

    def __init__(self, made: Callable[..., Tensor | None], arguments: dict[str, Any], row: Row) -> None:
        """Takes transformers' function `made` that makes a mask, its arguments `arguments`, and the row."""
        if row.index_F is not None and (arguments.get("use_vmap", True) or arguments.get("local_size") is not None):
            raise CannotShareError
        self.row = row
        self._made, self._arguments = made, arguments
        self._found: dict[int, Tensor | None] = {}

    def of(self, run: Run) -> Tensor | None:
        """The mask [1, 1, L, L] of every sequence of a run; None for plain causal attention that needs no mask."""
        if run.length not in self._found:
            window = self._arguments.get("local_size")
            # A packed row is no reason to spell out a causal mask; custom mask functions of a family are.
            plain = not self._arguments.get("use_vmap", True) and (window is None or run.length <= window)
            arguments = {
                **self._arguments,
                "q_length": run.length,
                "kv_length": run.length,
                "allow_is_causal_skip": plain,
            }
            if plain:
                arguments |= {"q_offset": 0, "kv_offset": 0, "local_size": None, "mask_function": causal_mask_function}
            else:  # the family's function gets indices in the row, and counts from each sequence's start
                arguments |= {"q_offset": run.start, "kv_offset": run.start}
            self._found[run.length] = self._made(**arguments)
        return self._found[run.length]


def wrapped(implementation: str) -> str:
    """The name under which an implementation accepts packed rows; others keep their own name."""
    if implementation not in WRAPPED:
        return implementation
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _attention(implementation))
        AttentionMaskInterface.register(name, _mask(implementation))
    return name


def unwrapped(name: str) -> str:
    """The implementation behind a name that `wrapped` gave; others are their own."""
    return name.removeprefix(_PREFIX)


def _mask(implementation: str) -> Callable[..., Any]:
    made = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(*args: Any, **arguments: Any) -> Any:
        row = _packing.get()
        return made(*args, **arguments) if row is None else PackedMask(made, arguments, row)

    return mask


def _attention(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A family's eager attention lives beside its layers, under the same name in all of transformers.
        owner = sys.modules[type(module).__module__]
        inner: Any = ALL_ATTENTION_FUNCTIONS.get(implementation) or owner.eager_attention_forward
        if not isinstance(attention_mask, PackedMask):
            return inner(module, query, key, value, attention_mask, *args, **more)
        row = attention_mask.row
        # `split`, not slices: the gradient of a slice is as large as the row.
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
