"""Signals as entries of a cache, one for each rollout. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.core.signals import Candidates, Sampled, TeacherSignal, TopK
from retort.errors import SignalError

#: Names of the tensors of an entry, by the attribute of a signal.
_SAMPLED = {"logp": "logp_N"}
_TOPK = {"ids": "ids_NK", "logp": "logp_NK", "sampled": "sampled_logp_N", "entropy": "entropy_N"}
_CANDIDATES = {"ids": "ids_NK", "logp": "logp_NK", "sampled": "sampled_logp_N"}
#: Of a signal in which a teacher's own list comes with the student's ids.
_TOP = "top_"
#: The flags of a `TopK` as one tensor, uint8: the whole vocabulary, and an exact entropy.
_FLAGS = "flags"


def entries_of(signal: TeacherSignal, steps_R: Sequence[int]) -> list[dict[str, Tensor]]:
    """A signal as one entry for each rollout.

    Args:
        signal: A `Sampled`, `TopK` or `Candidates`.
        steps_R: Number of steps of each rollout, in order.

    Raises:
        SignalError: It is of another kind.
    """
    columns, flags = _columns(signal)
    parts = {name: values.split(list(steps_R)) for name, values in columns.items()}
    return [{**{name: own[index] for name, own in parts.items()}, **flags} for index in range(len(steps_R))]


def signal_of(
    entries: Sequence[Mapping[str, Tensor] | None],
    tokens_R: Sequence[Tensor],
    source: str,
    counts: Mapping[str, float],
) -> TeacherSignal:
    """A signal made of entries; the steps of rollouts without one are not valid.

    Args:
        entries: Entries of one kind, by rollout; None where there was no context. One at least is there.
        tokens_R: The decided tokens of each rollout, the student's ids.
        source: See `TeacherSignal`.
        counts: See `TeacherSignal`.

    Raises:
        SignalError: An entry is about another number of steps, or its numbers are none.
    """
    first = next(entry for entry in entries if entry is not None)
    columns: dict[str, Tensor] = {}
    for name, like in first.items():
        if name == _FLAGS or name == _TOP + _FLAGS:
            columns[name] = like
            continue
        rows = [
            _nothing(like, len(tokens_A)) if entry is None else entry[name]
            for entry, tokens_A in zip(entries, tokens_R, strict=True)
        ]
        columns[name] = torch.cat(rows)
    known = [entry is not None for entry in entries]
    steps_R = torch.tensor([len(tokens_A) for tokens_A in tokens_R])
    valid_N = None if all(known) else torch.tensor(known).repeat_interleave(steps_R)
    tokens_N, rest = torch.cat(list(tokens_R)), {"valid_N": valid_N, "counts": counts}
    if "logp" in columns and columns["logp"].ndim == 1:
        return Sampled(tokens_N, source, columns["logp"], **rest)
    if not any(name.startswith(_TOP) or name == _FLAGS for name in columns):
        return Candidates(tokens_N, source, **_named(_CANDIDATES, columns), **rest)
    if _FLAGS in columns:
        return _top(tokens_N, source, columns, "", rest)
    top = _top(tokens_N, source, columns, _TOP, rest)
    return Candidates(tokens_N, source, **_named(_CANDIDATES, columns), top=top, **rest)


def _columns(signal: TeacherSignal) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a signal that have a row for each step, and its flags."""
    if isinstance(signal, Sampled):
        return _present(signal, _SAMPLED), {}
    if isinstance(signal, TopK):
        return _present(signal, _TOPK), {_FLAGS: torch.tensor([signal.whole, signal.entropy_exact]).to(torch.uint8)}
    if isinstance(signal, Candidates):
        own = _present(signal, _CANDIDATES)
        if signal.top is None:
            return own, {}
        columns, flags = _columns(signal.top)
        more = {_TOP + name: values for name, values in columns.items()}
        return own | more, {_TOP + name: values for name, values in flags.items()}
    raise SignalError(f"{signal.source}: a signal of kind {type(signal).__name__} cannot be cached")


def _present(signal: TeacherSignal, names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {name: getattr(signal, attribute) for name, attribute in names.items()}
    return {name: values for name, values in found.items() if values is not None}


def _named(names: Mapping[str, str], columns: Mapping[str, Tensor], before: str = "") -> dict[str, Any]:
    return {attribute: columns[before + name] for name, attribute in names.items() if before + name in columns}


def _top(tokens_N: Tensor, source: str, columns: Mapping[str, Tensor], before: str, rest: Mapping[str, Any]) -> TopK:
    whole, exact = (bool(flag) for flag in columns[before + _FLAGS])
    return TopK(tokens_N, source, **_named(_TOPK, columns, before), whole=whole, entropy_exact=exact, **rest)


def _nothing(like: Tensor, steps: int) -> Tensor:
    """Rows that mean nothing, of the shape and dtype of another entry's."""
    return like.new_zeros(steps, *like.shape[1:])
