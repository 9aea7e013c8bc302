"""What a method may ask of a teacher, and whether a teacher can provide it. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from retort.errors import SignalError

NeedKind = Literal["text", "sampled", "topk", "logp_at", "entropy", "dense", "hidden"]


@dataclass(frozen=True, order=True)
class Need:
    """One quantity that a method needs from the teacher behind a view.

    Attributes:
        kind: `sampled` (log-prob of the sampled token), `topk` (the teacher's own most likely ids), `logp_at`
            (log-probs of ids from another model), `entropy` (of the whole distribution, nats), `dense` (every
            log-prob), `hidden` (the teacher's last hidden states), `text`.
        k: Number of candidates, for `topk` and `logp_at`.
        ids_of: For `logp_at`, the model whose most likely ids they are.
    """

    kind: NeedKind
    k: int = 0
    ids_of: Literal["teacher", "student"] = "teacher"

    def __str__(self) -> str:
        names = {
            "topk": f"its top-{self.k}",
            "logp_at": f"log-probs of the {self.ids_of}'s top-{self.k}",
            "sampled": "log-prob of the sampled token",
            "entropy": "entropy",
            "dense": "the whole distribution",
            "hidden": "its last hidden states",
        }
        return names.get(self.kind, self.kind)


SAMPLED = Need("sampled")
ENTROPY = Need("entropy")
DENSE = Need("dense")
HIDDEN = Need("hidden")


def logp_at(k: int) -> Need:
    """The need for the teacher's log-probs of the student's `k` most likely ids."""
    return Need("logp_at", k, ids_of="student")


#: The needs that a capability meets besides its own: everything follows from a whole distribution.
IMPLIED: Mapping[NeedKind, frozenset[NeedKind]] = {"dense": frozenset({"sampled", "topk", "logp_at", "entropy"})}


def can_meet(capabilities: frozenset[NeedKind], need: Need) -> bool:
    """Whether a teacher with these capabilities can meet the need."""
    return any(need.kind == has or need.kind in IMPLIED.get(has, ()) for has in capabilities)


def require_finite(name: str, values: Tensor, source: str, *, allow_minus_inf: bool = False) -> None:
    """Raises `SignalError` where a teacher's numbers hold NaN or infinity (a banned id may be minus infinity)."""
    bad = values.isnan() | (values == float("inf"))
    if not allow_minus_inf:
        bad = bad | (values == float("-inf"))
    if bool(bad.any()):
        step = int(bad.nonzero()[0][0])
        worst = float(values[bad][0])
        raise SignalError(f"{source}: {name} is {worst} at step {step} of the batch; stopping before it is learnt")
