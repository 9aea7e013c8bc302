"""Two models with two tokenizers in float64: random heads over random units, and slow references of every loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.core.losses import TokenLosses
from retort.core.signals import Spans, TeacherTokens, unit_columns
from retort.functional import cross_token_losses, linear_token_losses, token_losses
from retort.method import Method

F64 = torch.float64
#: Tokens on either side of each unit of three rollouts; the second ends in bytes that the teacher cuts further on.
LAYOUT = [[(1, 1), (2, 1), (1, 1), (1, 3), (2, 2)], [(1, 1), (3, 1), (1, 1)], [(1, 1), (1, 1), (1, 2)]]
STOPS = ([5, 6], [8])
#: Ids that are the same bytes on both sides.
SHARED = [(0, 3), (1, 0), (2, 7), (4, 4), (5, 8)]

Unit = tuple[slice, slice]


def pieces(own: int, theirs: int) -> tuple[list[bytes], list[bytes]]:
    """A unit's bytes in so many tokens on either side, without a boundary in common before its end."""
    text = bytes(range(ord("a"), ord("a") + own + theirs - 1))
    ours = [text[i : i + 1] for i in range(own - 1)] + [text[own - 1 :]]
    return ours, [text[:own], *(text[i : i + 1] for i in range(own, own + theirs - 1))] if theirs > 1 else [text]


class Pair:
    """A student of 9 ids and a teacher of 10, hidden states and heads, and completions in the tokens of both."""

    def __init__(self, layout: Sequence[Sequence[tuple[int, int]]] = LAYOUT, *, seed: int = 0, tail: int = 1) -> None:
        """Draws a batch.

        Args:
            layout: Tokens on either side of each unit, by rollout.
            seed: Seed of all numbers.
            tail: Tokens on either side at the end of the second rollout that have no common boundary.
        """
        draw = torch.Generator().manual_seed(seed)
        self.units: list[Unit] = []
        self.pieces: tuple[list[bytes], list[bytes]] = ([], [])
        rollouts: tuple[list[int], list[int]] = ([], [])
        for number, units in enumerate(layout):
            for own, theirs in units:
                starts = [len(side) for side in self.pieces]
                for side, more, which in zip(self.pieces, pieces(own, theirs), rollouts, strict=True):
                    side += more
                    which += [number] * len(more)
                self.units.append((slice(starts[0], len(self.pieces[0])), slice(starts[1], len(self.pieces[1]))))
            if number == 1 and tail:
                for side, more, which in zip(self.pieces, ([b"x"] * tail, [b"x" * (tail + 1)]), rollouts, strict=True):
                    side += more
                    which += [number] * len(more)
        n, m = (len(side) for side in self.pieces)
        self.rollouts = (torch.tensor(rollouts[0]), torch.tensor(rollouts[1]))
        self.hidden = torch.randn(n, 5, generator=draw, dtype=F64).requires_grad_()
        self.head = torch.randn(9, 5, generator=draw, dtype=F64).requires_grad_()
        self.teacher_logits = torch.randn(m, 10, generator=draw, dtype=F64).requires_grad_()
        tokens = torch.randint(0, 9, (n,), generator=draw), torch.randint(0, 10, (m,), generator=draw)
        for index, (own, theirs) in enumerate(self.units):  # of every two units of one token, one is a shared pair
            if own.stop - own.start == theirs.stop - theirs.start == 1 and index % 2 == 0:
                pair = SHARED[int(torch.randint(0, len(SHARED), (1,), generator=draw))]
                tokens[0][own.start], tokens[1][theirs.start] = pair
        self.tokens = tokens
        self.shared = SHARED
        self.old = self.logp(self.logits.detach(), tokens[0]) - 0.1 * torch.rand(n, generator=draw, dtype=F64)

    @property
    def logits(self) -> Tensor:
        """The student's."""
        return self.hidden @ self.head.T

    @staticmethod
    def logp(logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probs of tokens."""
        return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)

    def losses(self, method: Method | str, **more: Any) -> TokenLosses:
        """Through `cross_token_losses`."""
        given: dict[str, Any] = {
            "student_logits": self.logits,
            "teacher_logits": self.teacher_logits,
            "student_tokens": self.tokens[0],
            "teacher_tokens": self.tokens[1],
            "student_pieces": self.pieces[0],
            "teacher_pieces": self.pieces[1],
            "shared": self.shared,
            "student_rollouts": self.rollouts[0],
            "teacher_rollouts": self.rollouts[1],
            "stops": STOPS,
            **more,
        }
        return cross_token_losses(method, **given)

    def spans(self, **more: Any) -> Spans:
        """The teacher's signal, as a run would make it."""
        teacher = self.teacher_logits.detach()
        pairs = torch.tensor(self.shared)
        columns, first = unit_columns(
            self.units, self.tokens[0], self.tokens[1], self.logp(teacher, self.tokens[1]), (pairs[:, 0], pairs[:, 1]),
            teacher_raw_M=teacher.gather(-1, self.tokens[1][:, None]).squeeze(-1),
        )  # fmt: skip
        stops = (torch.tensor(STOPS[0]), torch.tensor(STOPS[1]))
        theirs = TeacherTokens(
            self.tokens[1], self.logp(teacher, self.tokens[1]), lambda index: teacher[index], teacher.shape[1]
        )
        given: dict[str, Any] = {"shared": (pairs[:, 0], pairs[:, 1]), "stops": stops, "place_N": first}
        given |= {"theirs": theirs, **columns, **more}
        return Spans(self.tokens[0], "teacher", lambda rows: teacher[first[rows]], teacher.shape[1], **given)

    def dense(self, method: Method | str, rows: Tensor | None = None, **more: Any) -> TokenLosses:
        """Through `token_losses`, with a signal of spans."""
        rows = torch.arange(len(self.tokens[0])) if rows is None else rows
        signal = self.spans().select(rows)
        given: dict[str, Any] = {
            "student_logits": self.logits[rows],
            "teacher_logits": signal,
            "tokens": self.tokens[0][rows],
            "rollouts": self.rollouts[0][rows],
            **more,
        }
        return token_losses(method, **given)

    def linear(self, method: Method | str, **more: Any) -> TokenLosses:
        """The same through the loss core."""
        given: dict[str, Any] = {
            "student_hidden": self.hidden,
            "student_head": self.head,
            "extra_views": {"teacher": self.spans()},
            "tokens": self.tokens[0],
            "rollouts": self.rollouts[0],
            **more,
        }
        return linear_token_losses(method, **given)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """With respect to the student's hidden states and head."""
        return torch.autograd.grad(loss, (self.hidden, self.head))

    def per_token(self, total: Tensor) -> Tensor:
        """A sum over units, divided by the mean of both token counts."""
        return total / ((len(self.tokens[0]) + len(self.tokens[1])) / 2)


# --- slow references: a number of one unit, live in the student's logits ---

Reference = Callable[[Pair, Unit], Tensor]


def total(pair: Pair, of_unit: Reference) -> Tensor:
    """The sum over all units, by a loop."""
    return torch.stack([of_unit(pair, unit) for unit in pair.units]).sum()


def rows(pair: Pair, unit: Unit) -> tuple[Tensor, Tensor]:
    """Both models' log-probs where the unit begins."""
    teacher = pair.teacher_logits.detach()
    return pair.logits[unit[0].start].log_softmax(-1), teacher[unit[1].start].log_softmax(-1)


def is_matched(pair: Pair, unit: Unit) -> bool:
    """Whether the unit is one shared id on both sides."""
    own, theirs = unit
    alone = own.stop - own.start == theirs.stop - theirs.start == 1
    return alone and (int(pair.tokens[0][own.start]), int(pair.tokens[1][theirs.start])) in pair.shared


def sums(pair: Pair, unit: Unit) -> tuple[Tensor, Tensor]:
    """Both models' log-probs of the whole unit."""
    ours, theirs = pair.logits[unit[0]].log_softmax(-1), pair.teacher_logits.detach()[unit[1]].log_softmax(-1)
    found = []
    for logp, ids in ((ours, pair.tokens[0][unit[0]]), (theirs, pair.tokens[1][unit[1]])):
        found.append(torch.stack([logp[i, int(y)] for i, y in enumerate(ids)]).sum())
    return found[0], found[1]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two lists of probabilities."""
    return torch.stack([a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)]).sum()


def span_scores(pair: Pair, unit: Unit, score: str = "log_prob") -> tuple[Tensor, Tensor]:
    """SimCT's Q of student and teacher: a softmax over the scores, that of the unit last where it has one."""
    own, theirs = unit
    if score == "raw_logit":
        start = pair.logits[own.start], pair.teacher_logits.detach()[theirs.start]
        every = pair.logits[own], pair.teacher_logits.detach()[theirs]
    else:
        start = rows(pair, unit)
        every = pair.logits[own].log_softmax(-1), pair.teacher_logits.detach()[theirs].log_softmax(-1)
    found = []
    for side, part in enumerate(unit):
        scores = [start[side][pairs[side]] for pairs in pair.shared]
        if not is_matched(pair, unit):
            ids = pair.tokens[side][part]
            scores.append(torch.stack([every[side][i, int(y)] for i, y in enumerate(ids)]).mean())
        found.append(torch.stack(scores).softmax(0))
    return found[0], found[1]


def simct(score: str = "log_prob", threshold: float | None = None) -> Reference:
    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        value = kl(*span_scores(pair, unit, score))
        if threshold is not None:
            _, teacher = rows(pair, unit)
            mass = float(sum(teacher[b].exp() for _, b in pair.shared))
            if not is_matched(pair, unit):
                mass += math.exp(float(sums(pair, unit)[1]) / (unit[1].stop - unit[1].start))
            if min(1.0, mass) < 1.0 / threshold:
                return value * 0.0
        return value

    return of_unit


def strict(top_k: int | None) -> Reference:
    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        if not is_matched(pair, unit):
            return pair.logits.sum() * 0.0
        student, teacher = rows(pair, unit)
        kept = sorted(pair.shared, key=lambda ids: -float(student[ids[0]].detach()))[:top_k]
        return kl(
            *(torch.stack([side[ids[i]] for ids in kept]).softmax(0) for i, side in enumerate((student, teacher)))
        )

    return of_unit


def uld(top_k: int) -> Reference:
    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        student, teacher = (side.exp().sort(descending=True).values for side in rows(pair, unit))
        value = (student[top_k:].sum() - teacher[top_k:].sum()).abs()
        for rank in range(top_k):
            p = student[rank] if rank < len(student) else torch.zeros((), dtype=F64)
            q = teacher[rank] if rank < len(teacher) else torch.zeros((), dtype=F64)
            value = value + (p - q).abs()
        return value

    return of_unit


def gold(
    merge: str = "observed", *, hybrid: bool = False, weights: tuple[float, float] = (0.5, 0.5), jsd: float = 0.5
) -> Reference:
    """GOLD's distance; `weights` of shared ids and of others, `jsd` the teacher's in the divergence of shared ids."""

    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        merged = []
        for logits, ids, part in zip((pair.logits, pair.teacher_logits.detach()), pair.tokens, unit, strict=True):
            probs = logits[part].softmax(-1)
            place = len(probs) - 1 if merge == "bayesian" else 0
            number = probs[place]
            for other, token in enumerate(ids[part]):
                if other != place:
                    number = number * probs[other, int(token)]
            merged.append(number)
        if not hybrid:
            return in_order(*merged)
        found = torch.zeros((), dtype=F64)
        for own, their in pair.shared:
            p, q = merged[0][own], merged[1][their]
            mean = jsd * q + (1 - jsd) * p
            found = found + weights[0] * (jsd * q * (q / mean).log() + (1 - jsd) * p * (p / mean).log())
        taken = [{both[side] for both in pair.shared} for side in (0, 1)]
        others = [m[[i for i in range(len(m)) if i not in ids]] for m, ids in zip(merged, taken, strict=True)]
        return found + weights[1] * in_order(*others)

    return of_unit


def in_order(ours: Tensor, theirs: Tensor) -> Tensor:
    """Sum of the distances of two lists, each from its largest number down."""
    ours, theirs = (side.sort(descending=True).values for side in (ours, theirs))
    zero = torch.zeros((), dtype=F64)
    count = max(len(ours), len(theirs))
    lists = [[side[i] if i < len(side) else zero for i in range(count)] for side in (ours, theirs)]
    return torch.stack([(p - q).abs() for p, q in zip(*lists, strict=True)]).sum()


def stop_decision(pair: Pair, unit: Unit) -> Tensor:
    student, teacher = (side.exp() for side in rows(pair, unit))
    p, q = sum(teacher[i] for i in STOPS[1]), sum(student[i] for i in STOPS[0])
    return kl(torch.stack([p, 1 - p]), torch.stack([q, 1 - q]))


def likelihood(tau: float) -> Reference:
    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        ours, theirs = ((logp / tau).exp() for logp in sums(pair, unit))
        return kl(torch.stack([theirs, 1 - theirs]), torch.stack([ours, 1 - ours]))

    return of_unit


def sampled(advantage: Callable[[Tensor, Tensor], Tensor], *, clip: float | None = None) -> Reference:
    """A policy gradient on the unit: (log p_T, log p_old) of it -> its advantage."""

    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        ours, theirs = sums(pair, unit)
        old = pair.old[unit[0]].sum()
        ratio, gain = (ours - old).exp(), advantage(theirs, old).detach()
        value = -gain * ratio
        return value if clip is None else torch.maximum(value, -gain * ratio.clamp(1 - clip, 1 + clip))

    return of_unit


def with_baseline(top_k: int | None) -> Reference:
    """OPD with the value of the unit's first position, on the student's most likely shared ids."""

    def of_unit(pair: Pair, unit: Unit) -> Tensor:
        student, teacher = rows(pair, unit)
        kept = sorted(pair.shared, key=lambda ids: -float(student[ids[0]].detach()))[:top_k]
        value = -kl(
            *(torch.stack([side[ids[i]] for ids in kept]).softmax(0) for i, side in enumerate((student, teacher)))
        )
        return sampled(lambda theirs, old: theirs - old - value)(pair, unit)

    return of_unit
