"""What a method may ask of a teacher, and whether a teacher can provide it. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from retort.errors import SignalError

NeedKind = Literal[
    "text",
    "sampled",
    "topk",
    "logp_at",
    "entropy",
    "entropy_bound",
    "temperature",
    "dense",
    "gaussian",
    "hidden",
    "probability",
    "spans",
    "disagreement",
    "lookahead",
]


@dataclass(frozen=True, order=True)
class Need:
    """One quantity that a method needs from the teacher behind a view.

    Attributes:
        kind: `sampled` (log-prob of the sampled token), `topk` (the teacher's own most likely ids), `logp_at`
            (log-probs of ids from another model), `entropy` (of the whole distribution, nats), `entropy_bound` (a
            lower bound of it, from a top-k), `temperature` (all that it gives also at a temperature other than 1),
            `dense` (every log-prob), `gaussian` (mean and standard deviation of the next latent), `hidden` (the
            teacher's last hidden states), `spans` (aligned units of tokens, see `retort.core.signals.Spans`),
            `probability` (of what was decided: a token has one, a latent has a density), `disagreement` (how far
            several teachers differ, nats), `lookahead` (the largest probability one token later, after each of the
            student's most likely ids), `text`.
        k: Number of candidates, for `topk`, `logp_at` and `lookahead`.
        ids_of: For `logp_at` and `lookahead`, the model whose most likely ids they are.
        or_spans: Whether a signal of spans meets it as well, because the part has a form of its own for units. It asks
            for nothing else, so needs that differ in it are equal.
        or_bound: For `entropy`, whether a lower bound meets it as well; such needs are equal, too.
        or_gaussian: For `dense`, whether a Gaussian over latents meets it as well, because the part asks `Policy`
            alone; such needs are equal, too.
        above: For `lookahead`: it is needed only where the student's entropy is above this, nats; such needs are equal.
    """

    kind: NeedKind
    k: int = 0
    ids_of: Literal["teacher", "student"] = "teacher"
    or_spans: bool = field(default=False, compare=False)
    or_bound: bool = field(default=False, compare=False)
    or_gaussian: bool = field(default=False, compare=False)
    above: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        names = {
            "topk": f"its top-{self.k}",
            "logp_at": f"log-probs of the {self.ids_of}'s top-{self.k}",
            "sampled": "log-prob of the sampled token",
            "entropy": "entropy, or a lower bound of it" if self.or_bound else "entropy",
            "entropy_bound": "a lower bound of its entropy",
            "temperature": "its numbers at a temperature other than 1",
            "dense": "the whole distribution",
            "gaussian": "mean and standard deviation of the next latent",
            "hidden": "its last hidden states",
            "probability": "the probability of what was decided",
            "spans": "its scores of aligned spans of tokens",
            "disagreement": "how far several teachers differ",
            "lookahead": f"a look one token ahead after the {self.ids_of}'s top-{self.k}",
        }
        return names.get(self.kind, self.kind)


SAMPLED = Need("sampled")
ENTROPY = Need("entropy")
DENSE = Need("dense")
#: The whole policy, of whichever kind: parts that compare policies by `Policy` alone need no more.
POLICY = Need("dense", or_gaussian=True)
GAUSSIAN = Need("gaussian")
HIDDEN = Need("hidden")
PROBABILITY = Need("probability")
SPANS = Need("spans")
TEMPERATURE = Need("temperature")
DISAGREEMENT = Need("disagreement")

#: What a teacher can give: a kind of need, or one with the largest k that it can be asked for.
Capability = NeedKind | Need


def logp_at(k: int) -> Need:
    """The need for the teacher's log-probs of the student's `k` most likely ids."""
    return Need("logp_at", k, ids_of="student")


#: The needs that a capability meets besides its own. Everything follows from a whole distribution over the student's
#: ids: there every token is a unit by itself.
IMPLIED: Mapping[NeedKind, frozenset[NeedKind]] = {
    "dense": frozenset({"sampled", "topk", "logp_at", "entropy", "spans", "temperature", "probability"}),
    "spans": frozenset({"temperature"}),
}


def can_meet(capabilities: Iterable[Capability], need: Need) -> bool:
    """Whether a teacher with these capabilities can meet the need.

    Example:
        >>> from retort.core.needs import Need, can_meet
        >>> [can_meet({"sampled", Need("topk", 20)}, Need("topk", k)) for k in (16, 32)]
        [True, False]
    """
    either = {"spans": need.or_spans, "entropy_bound": need.or_bound, "gaussian": need.or_gaussian}
    kinds = {need.kind, *(kind for kind, also in either.items() if also)}
    for has in capabilities:
        kind = has.kind if isinstance(has, Need) else has
        enough = not isinstance(has, Need) or need.k <= has.k
        if enough and not kinds.isdisjoint({kind, *IMPLIED.get(kind, ())}):
            return True
    return False


def shared(each: Sequence[Iterable[Capability]], kinds: Iterable[NeedKind]) -> frozenset[Capability]:
    """What every one of several teachers can be asked for, each kind with the largest k that all of them allow.

    Args:
        each: The capabilities of each teacher.
        kinds: The kinds that are looked for.

    Example:
        >>> from retort.core.needs import Need, shared
        >>> shared([{"dense"}, {Need("topk", 20)}], ["sampled", "topk"])
        frozenset({Need(kind='topk', k=20, ids_of='teacher', or_spans=False, or_bound=False, or_gaussian=False)})
    """
    found = set[Capability]()
    for kind in kinds:
        most = [_most(capabilities, kind) for capabilities in each]
        if None in most:
            continue
        k = min(own for own in most if own is not None)
        ids_of: Literal["teacher", "student"] = "student" if kind == "logp_at" else "teacher"
        found.add(kind if k == math.inf else Need(kind, int(k), ids_of))
    return frozenset(found)


def _most(capabilities: Iterable[Capability], kind: NeedKind) -> float | None:
    """The largest k of a kind, infinite where there is no limit; None where it cannot be asked for."""
    able = [has.k if isinstance(has, Need) else math.inf for has in capabilities if can_meet([has], Need(kind))]
    return max(able, default=None)


def listed(capabilities: Iterable[Capability]) -> str:
    """The capabilities in words, for messages; `nothing` where there are none."""
    return (
        ", ".join(sorted(f"{has.kind} of {has.k}" if isinstance(has, Need) else has for has in capabilities))
        or "nothing"
    )


def require_finite(name: str, values: Tensor, source: str, *, allow_minus_inf: bool = False) -> None:
    """Raises `SignalError` where a teacher's numbers hold NaN or infinity (a banned id may be minus infinity)."""
    bad = values.isnan() | (values == float("inf"))
    if not allow_minus_inf:
        bad = bad | (values == float("-inf"))
    if bool(bad.any()):
        step = int(bad.nonzero()[0][0])
        worst = float(values[bad][0])
        raise SignalError(f"{source}: {name} is {worst} at step {step} of the batch; stopping before it is learnt")
