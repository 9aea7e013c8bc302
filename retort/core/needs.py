"""What a method may ask of a teacher, and whether a teacher can provide it. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from retort.errors import SignalError

NeedKind = Literal["text", "sampled", "topk", "logp_at", "entropy", "dense", "hidden", "spans", "disagreement"]


@dataclass(frozen=True, order=True)
class Need:
    """One quantity that a method needs from the teacher behind a view.

    Attributes:
        kind: `sampled` (log-prob of the sampled token), `topk` (the teacher's own most likely ids), `logp_at`
            (log-probs of ids from another model), `entropy` (of the whole distribution, nats), `dense` (every
            log-prob), `hidden` (the teacher's last hidden states), `spans` (aligned units of tokens, see
            `retort.core.signals.Spans`), `disagreement` (how far several teachers differ, nats), `text`.
        k: Number of candidates, for `topk` and `logp_at`.
        ids_of: For `logp_at`, the model whose most likely ids they are.
        or_spans: Whether a signal of spans meets it as well, because the part has a form of its own for units. It asks
            for nothing else, so needs that differ in it are equal.
    """

    kind: NeedKind
    k: int = 0
    ids_of: Literal["teacher", "student"] = "teacher"
    or_spans: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        names = {
            "topk": f"its top-{self.k}",
            "logp_at": f"log-probs of the {self.ids_of}'s top-{self.k}",
            "sampled": "log-prob of the sampled token",
            "entropy": "entropy",
            "dense": "the whole distribution",
            "hidden": "its last hidden states",
            "spans": "its scores of aligned spans of tokens",
            "disagreement": "how far several teachers differ",
        }
        return names.get(self.kind, self.kind)


SAMPLED = Need("sampled")
ENTROPY = Need("entropy")
DENSE = Need("dense")
HIDDEN = Need("hidden")
SPANS = Need("spans")
DISAGREEMENT = Need("disagreement")


def logp_at(k: int) -> Need:
    """The need for the teacher's log-probs of the student's `k` most likely ids."""
    return Need("logp_at", k, ids_of="student")


#: The needs that a capability meets besides its own. Everything follows from a whole distribution over the student's
#: ids: there every token is a unit by itself.
IMPLIED: Mapping[NeedKind, frozenset[NeedKind]] = {
    "dense": frozenset({"sampled", "topk", "logp_at", "entropy", "spans"})
}


def can_meet(capabilities: frozenset[NeedKind], need: Need) -> bool:
    """Whether a teacher with these capabilities can meet the need."""
    kinds = {need.kind, "spans"} if need.or_spans else {need.kind}
    return any(not kinds.isdisjoint({has, *IMPLIED.get(has, ())}) for has in capabilities)


def require_finite(name: str, values: Tensor, source: str, *, allow_minus_inf: bool = False) -> None:
    """Raises `SignalError` where a teacher's numbers hold NaN or infinity (a banned id may be minus infinity)."""
    bad = values.isnan() | (values == float("inf"))
    if not allow_minus_inf:
        bad = bad | (values == float("-inf"))
    if bool(bad.any()):
        step = int(bad.nonzero()[0][0])
        worst = float(values[bad][0])
        raise SignalError(f"{source}: {name} is {worst} at step {step} of the batch; stopping before it is learnt")
