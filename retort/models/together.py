"""Ways to compute sequences together, found by trying: a packed row, a padded batch, a shared prompt, or alone.

A sequence alone is the definition. Some families change their arithmetic with the longest sequence of a batch (rotary
factors), others at a length that their settings name (windows, chunks). So the trials go beyond every such length.
Where a model is too large to be tried at such a length, the length is lowered for the trial.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from retort.core.sequences import TokenSequence

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel

#: Settings with a length after which a family may compute differently.
_SWITCH = re.compile(r"window|chunk|block_size|local_attention|original_max_position|max_local")
#: Multiplications that a trial at a switch may cost before the switch is lowered for it.
_AFFORDABLE = {"cpu": 2e11, "cuda": 1e14}
#: The length that a switch is lowered to; long enough for a trial, shorter than its sequences.
_LOWERED = 16


def switches(config: Any) -> list[tuple[str, int]]:
    """Settings of a configuration, at any depth, with a length after which arithmetic may change: name, length."""
    found = {(name, value) for holder in _holders(config) for name, value in holder.items() if _is_switch(name, value)}
    return sorted(found, key=lambda one: (one[1], one[0]))


def choose_batching(lm: LanguageModel) -> None:
    """Sets, by trying, how sequences of this model may be computed together.

    Args:
        lm: The model; its `packs`, `shared_prefixes`, `together_up_to`, `rereads_from` and `tried` are set.
    """
    lm.packs = lm.shared_prefixes = False
    lm.together_up_to = lm.rereads_from = None
    lm.tried = []
    ids_T = (torch.arange(26) * 7 + 1) % lm.head().width
    # Two sequences that form a batch, and neighbours that would leak into each other.
    sequences = [_decided(tokens_L) for tokens_L in ids_T.split([3, 9, 9, 5])]
    with torch.no_grad():
        alone_ND = lm.alone(sequences).float()
        if not alike(lm, lambda: lm.padded(sequences), alone_ND):
            lm.together_up_to = 0
        lm.packs = alike(lm, lambda: lm.packed(sequences), alone_ND)
        if lm.packs:
            lm.shared_prefixes = _shares(lm, ids_T, [5, 4, 6, 2, 9])
        for length in dict.fromkeys(length for _, length in switches(lm.model.config.get_text_config())):
            if _LOWERED // 2 < length < lm.context - 8:
                _try_beyond(lm, length)


def _try_beyond(lm: LanguageModel, length: int) -> None:
    """Tries sequences on both sides of a length."""
    cost = 16.0 * lm.parameters * length
    affordable = cost <= _AFFORDABLE.get(lm.device.type, _AFFORDABLE["cpu"])
    with contextlib.nullcontext(length) if affordable else lowered(lm, length, _LOWERED) as switch:
        sizes = [3, switch + 6, switch // 2, switch + 6]
        ids_T = (torch.arange(sum(sizes)) * 7 + 1) % lm.head().width
        sequences = [_decided(tokens_L) for tokens_L in ids_T.split(sizes)]
        alone_ND = lm.alone(sequences).float()
        padded = alike(lm, lambda: lm.padded(sequences), alone_ND)
        packed = lm.packs and alike(lm, lambda: lm.packed(sequences), alone_ND)
        begun_ND = lm.alone([sequences[1].part(0, switch - 2)])
        same_start = alike(lm, lambda: begun_ND, alone_ND[2 : 2 + len(begun_ND)])
        if not padded:
            lm.together_up_to = length if lm.together_up_to is None else min(lm.together_up_to, length)
        elif lm.packs and not packed:
            lm.packs = lm.shared_prefixes = False
        if not same_start:
            lm.rereads_from = length if lm.rereads_from is None else min(lm.rereads_from, length)
        if padded and lm.shared_prefixes:
            lm.shared_prefixes = _shares(lm, ids_T, [switch - 4, 4, 12, 8])
    if affordable:
        lm.tried.append(length)


def _shares(lm: LanguageModel, ids_T: Tensor, sizes: Sequence[int]) -> bool:
    """Whether completions of these sizes of one prompt, the first size, may share it in a row."""
    prompt, *completions = ids_T[: sum(sizes)].split(list(sizes))
    sequences = [_decided(torch.cat([prompt, completion]), behind=len(prompt)) for completion in completions]
    alone_ND = lm.alone(sequences).float()
    before, lm.shared_prefixes = lm.shared_prefixes, True
    try:
        return alike(lm, lambda: lm.packed(sequences), alone_ND)
    finally:
        lm.shared_prefixes = before


def _decided(tokens_L: Tensor, behind: int = 1) -> TokenSequence:
    """A sequence whose tokens are all decided except the first `behind`."""
    return TokenSequence(tokens_L, torch.arange(len(tokens_L)) >= behind)


def alike(lm: LanguageModel, compute: Callable[[], Tensor], alone_ND: Tensor) -> bool:
    """Whether a way of computing gives the hidden states [N, D] of sequences alone, to rounding."""
    try:
        found_ND = compute().float()
    except Exception:  # a family may fail in any way on restarting positions and a mask it cannot read
        return False
    if found_ND.shape != alone_ND.shape:
        return False
    apart_N = (found_ND - alone_ND).norm(dim=1) / alone_ND.norm(dim=1).clamp_min(1e-6)
    # A token of a neighbour would change more than this, and rounding less (NaN fails the comparison).
    return bool((apart_N < (1e-3 if lm.precision == "fp32" else 5e-2)).all())


@contextlib.contextmanager
def lowered(lm: LanguageModel, length: int, to: int) -> Iterator[int]:
    """Lowers every switch of a model at one length, in its settings and in its layers, for the block; yields the other.

    Args:
        lm: The model.
        length: The length of the switches.
        to: The length to lower them to.
    """
    named = {name for name, value in switches(lm.model.config.get_text_config()) if value == length}
    holders: list[dict[str, Any]] = [*_holders(lm.model.config.get_text_config())]
    configs = {id(holder) for holder in holders}
    for module in lm.model.modules():
        holders += [vars(module), *(held for held in _holders(getattr(module, "config", None)))]
    # Layers may also keep such a length under a name of their own.
    changed = [
        (holder, name)
        for holder in {id(holder): holder for holder in holders}.values()
        for name, value in holder.items()
        if type(value) is int
        and value == length
        and (name in named or (id(holder) not in configs and _SWITCH.search(name)))
    ]
    for holder, name in changed:
        holder[name] = to
    try:
        yield to
    finally:
        for holder, name in changed:
            holder[name] = length


def _is_switch(name: Any, value: Any) -> bool:
    return type(value) is int and value > 0 and isinstance(name, str) and _SWITCH.search(name) is not None


def _holders(thing: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries in which a configuration keeps its settings."""
    if isinstance(thing, dict):
        held = cast("dict[str, Any]", thing)
    elif hasattr(thing, "to_dict") and hasattr(thing, "__dict__"):
        held = vars(thing)
    else:
        return
    yield held
    for value in list(held.values()):
        yield from _holders(value)
