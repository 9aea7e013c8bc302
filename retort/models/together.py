"""What may be computed together, found out by trying: a row, a padded batch, a prompt shared, or each by itself.

A sequence by itself is the definition. Some families change their arithmetic with the longest sequence of a batch
(rotary factors), others at a length that their settings name (windows, chunks): so what is tried reaches beyond every
such length. Where a model is too large to be tried at such a length, the length is lowered for the trial.
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

#: Settings after which a family may do something else.
_SWITCH = re.compile(r"window|chunk|block_size|local_attention|original_max_position|max_local")
#: Multiplications that a trial at a switch may cost before the switch is lowered for it.
_AFFORDABLE = {"cpu": 2e11, "cuda": 1e14}
#: What a switch is lowered to; longer than no trial needs, shorter than the sequences of one.
_LOWERED = 16


def switches(config: Any) -> list[tuple[str, int]]:
    """Settings of a configuration, at any depth, that name a length after which arithmetic may change: name, length."""
    found = {(name, value) for holder in _holders(config) for name, value in holder.items() if _is_switch(name, value)}
    return sorted(found, key=lambda one: (one[1], one[0]))


def settle(lm: LanguageModel) -> None:
    """Sets by trying how sequences of this model may be computed together.

    Args:
        lm: Its `packs`, `shares`, `together_up_to`, `rereads_from` and `tried` are set.
    """
    lm.packs = lm.shares = False
    lm.together_up_to = lm.rereads_from = None
    lm.tried = []
    ids_T = (torch.arange(26) * 7 + 1) % lm.head().width
    # Two that run as a batch, and neighbours that would leak into each other.
    sequences = [_decided(tokens_L) for tokens_L in ids_T.split([3, 9, 9, 5])]
    with torch.no_grad():
        alone_ND = lm.alone(sequences).float()
        if not _alike(lm, lambda: lm.padded(sequences), alone_ND):
            lm.together_up_to = 0
        lm.packs = _alike(lm, lambda: lm.packed(sequences), alone_ND)
        if lm.packs:
            lm.shares = _shares(lm, ids_T, [5, 4, 6, 2, 9])
        for length in dict.fromkeys(length for _, length in switches(lm.model.config.get_text_config())):
            if _LOWERED // 2 < length < lm.context - 8:
                _try_beyond(lm, length)


def _try_beyond(lm: LanguageModel, length: int) -> None:
    """What holds for sequences that a length parts."""
    cost = 16.0 * lm.parameters * length
    affordable = cost <= _AFFORDABLE.get(lm.device.type, _AFFORDABLE["cpu"])
    with contextlib.nullcontext(length) if affordable else lowered(lm, length, _LOWERED) as switch:
        sizes = [3, switch + 6, switch // 2, switch + 6]
        ids_T = (torch.arange(sum(sizes)) * 7 + 1) % lm.head().width
        sequences = [_decided(tokens_L) for tokens_L in ids_T.split(sizes)]
        alone_ND = lm.alone(sequences).float()
        padded = _alike(lm, lambda: lm.padded(sequences), alone_ND)
        packed = lm.packs and _alike(lm, lambda: lm.packed(sequences), alone_ND)
        begun_ND = lm.alone([sequences[1].part(0, switch - 2)])
        same_start = _alike(lm, lambda: begun_ND, alone_ND[2 : 2 + len(begun_ND)])
        if not padded:
            lm.together_up_to = length if lm.together_up_to is None else min(lm.together_up_to, length)
        elif lm.packs and not packed:
            lm.packs = lm.shares = False
        if not same_start:
            lm.rereads_from = length if lm.rereads_from is None else min(lm.rereads_from, length)
        if padded and lm.shares:
            lm.shares = _shares(lm, ids_T, [switch - 4, 4, 12, 8])
    if affordable:
        lm.tried.append(length)


def _shares(lm: LanguageModel, ids_T: Tensor, sizes: Sequence[int]) -> bool:
    """Whether answers of these sizes to one prompt, the first size, may share it in a row."""
    prompt, *answers = ids_T[: sum(sizes)].split(list(sizes))
    sequences = [_decided(torch.cat([prompt, answer]), behind=len(prompt)) for answer in answers]
    alone_ND = lm.alone(sequences).float()
    before, lm.shares = lm.shares, True
    try:
        return _alike(lm, lambda: lm.packed(sequences), alone_ND)
    finally:
        lm.shares = before


def _decided(tokens_L: Tensor, behind: int = 1) -> TokenSequence:
    """A sequence that is all decided but for its first tokens."""
    return TokenSequence(tokens_L, torch.arange(len(tokens_L)) >= behind)


def _alike(lm: LanguageModel, compute: Callable[[], Tensor], alone_ND: Tensor) -> bool:
    try:
        found_ND = compute().float()
    except Exception:  # whatever a family does with a row of restarting positions and a mask it cannot read
        return False
    if found_ND.shape != alone_ND.shape:
        return False
    apart_N = (found_ND - alone_ND).norm(dim=1) / alone_ND.norm(dim=1).clamp_min(1e-6)
    # Less than any token of a neighbour would change; more than that is never rounding (and NaN is no number).
    return bool((apart_N < (1e-3 if lm.precision == "fp32" else 5e-2)).all())


@contextlib.contextmanager
def lowered(lm: LanguageModel, length: int, to: int) -> Iterator[int]:
    """Within, every switch of a model at one length is at another, in its settings and in its layers; gives the other.

    Args:
        lm: The model.
        length: Where the switches are.
        to: Where they shall be.
    """
    named = {name for name, value in switches(lm.model.config.get_text_config()) if value == length}
    holders: list[dict[str, Any]] = [*_holders(lm.model.config.get_text_config())]
    configs = {id(holder) for holder in holders}
    for module in lm.model.modules():
        holders += [vars(module), *(held for held in _holders(getattr(module, "config", None)))]
    # Layers also keep such a length under a name of their own.
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
