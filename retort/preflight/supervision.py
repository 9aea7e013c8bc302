"""How much of the student's completions each method learns from, where the teacher has another tokenizer.

A method is not asked, it is run: on a made-up batch that holds every shape of unit which the completions have. A token
whose logits get no gradient there is one that the method says nothing about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from retort import registry
from retort.align.pieces import pieces
from retort.align.prefixes import Prefixes
from retort.core.rollouts import Rollout
from retort.core.signals import LONGEST_UNIT, Dense, Spans, TeacherSignal, TeacherTokens, unit_columns
from retort.core.steps import Clock
from retort.loss.one_batch import BatchInputs, OneBatch
from retort.method import Method
from retort.preflight.findings import Check
from retort.teachers.spanned import SpanTeacher

#: Ids of the made-up batch that are the same to both sides.
SHARED = 32
#: Completions of the made-up batch, each with every shape, right and wrong ones in turn. A method may pass over a token
#: because of the numbers or the reward, which is no loss by alignment.
COPIES = 16

#: The shared ids of the made-up batch that stop, and that are whitespace only.
STOP, BLANK = 0, 1


class Shape(NamedTuple):
    """A unit, as far as it matters what each of its tokens is.

    Attributes:
        student: Number of the student's tokens.
        teacher: Number of the teacher's tokens.
        matched: Whether it is one shared id on both sides.
        ends: Where the student's tokens end, and where the teacher's do, in order: numbers whose order alone counts.
            None: all of the student's but the last end inside of the teacher's first.
        blank: Which of the student's tokens are whitespace only; empty: none.
        rewritten: Whether the two sides spell different bytes.
    """

    student: int
    teacher: int
    matched: bool
    ends: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    blank: tuple[bool, ...] = ()
    rewritten: bool = False

    @staticmethod
    def of(ours: Sequence[bytes], theirs: Sequence[bytes], matched: bool) -> Shape:
        """The shape of a unit by what its tokens spell."""
        blank = tuple(piece.isspace() for piece in ours) if any(piece.isspace() for piece in ours) else ()
        sizes = len(ours), len(theirs), matched
        if matched or b"".join(ours) != b"".join(theirs):
            return Shape(*sizes, blank=blank, rewritten=not matched)
        ends = [list(accumulate(map(len, side))) for side in (ours, theirs)]
        order = {end: place for place, end in enumerate(sorted({0, *ends[0], *ends[1]}))}
        return Shape(*sizes, (tuple(order[end] for end in ends[0]), tuple(order[end] for end in ends[1])), blank)

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ends."""
        own, other = self.student, self.teacher
        last = own + other
        return self.ends or ((*range(1, own), last), (*range(own, last - 1), last))


@dataclass
class Positions:
    """The student's tokens by their place: the shape of their unit, and their index in it.

    Attributes:
        tokens: Number of tokens at each place.
        bytes: Number of bytes of the text that they spell.
        outside: Tokens and bytes in no unit.
    """

    tokens: Counter[tuple[Shape, int]] = field(default_factory=Counter)
    bytes: Counter[tuple[Shape, int]] = field(default_factory=Counter)
    outside: tuple[int, int] = (0, 0)

    @property
    def all_tokens(self) -> int:
        """All tokens."""
        return self.tokens.total() + self.outside[0]

    @property
    def all_bytes(self) -> int:
        """All bytes."""
        return self.bytes.total() + self.outside[1]

    def lost(self, taught: Mapping[Shape, Sequence[bool]]) -> tuple[float, float]:
        """The shares of tokens and of bytes that get nothing.

        Args:
            taught: For each shape, whether each of the student's tokens gets a gradient.
        """
        tokens, size = self.outside
        for (shape, index), count in self.tokens.items():
            if not taught[shape][index]:
                tokens, size = tokens + count, size + self.bytes[shape, index]
        return tokens / max(self.all_tokens, 1), size / max(self.all_bytes, 1)


def unit_positions(teacher: SpanTeacher, student_tokenizer: object, rollouts: Sequence[Rollout]) -> Positions:
    """The positions of the student's tokens in some of its completions.

    Raises:
        SignalError: The teacher cannot read one.
    """
    found, pair = Positions(), teacher.pair
    table = pair.prefixes
    partner = dict(zip(pair.shared.student_K.tolist(), pair.shared.teacher_K.tolist(), strict=True))
    stops = pair.student_stops.tolist()
    for sequence in (sequence for rollout in rollouts for sequence in rollout.sequences):
        read = pair.units(sequence)
        ids, theirs = sequence.actions_A.tolist(), read.sequence.actions_A.tolist()
        before = sequence.prefix.tokens_L.tolist()
        spelt = pieces(student_tokenizer, ids, before, stops=stops)  # type: ignore[arg-type]
        sizes = [0 if piece.startswith(b"\xff") else len(piece) for piece in spelt]
        unit_A, index = read.unit_A.tolist(), 0
        own_U, theirs_U = _by_unit(ids, unit_A), _by_unit(theirs, read.unit_B.tolist())
        shape_U = {
            unit: Shape.of(
                [table.student[token] for token in own],
                [table.teacher[token] for token in theirs_U[unit]],
                len(own) == len(theirs_U[unit]) == 1 and partner.get(own[0]) == theirs_U[unit][0],
            )
            for unit, own in own_U.items()
        }
        for place, unit in enumerate(unit_A):
            index = index + 1 if place and unit == unit_A[place - 1] else 0
            if unit < 0 or max(shape_U[unit][:2]) > LONGEST_UNIT:
                found.outside = (found.outside[0] + 1, found.outside[1] + sizes[place])
                continue
            found.tokens[shape_U[unit], index] += 1
            found.bytes[shape_U[unit], index] += sizes[place]
    return found


def _by_unit(ids: Sequence[int], units: Sequence[int]) -> dict[int, list[int]]:
    """The ids of each unit."""
    found: dict[int, list[int]] = {}
    for token, unit in zip(ids, units, strict=True):
        if unit >= 0:
            found.setdefault(unit, []).append(token)
    return found


def taught(method: Method, shapes: Sequence[Shape]) -> dict[Shape, list[bool]]:
    """For each shape of unit, which of the student's tokens the method's loss has a gradient at.

    Args:
        method: The method.
        shapes: Shapes.

    Raises:
        UserError: The method needs what the made-up batch lacks.
    """
    if not shapes:  # no token is in a unit
        return {}
    any_draw: list[bool] = _gradient(method, shapes).view(COPIES, -1).any(0).tolist()
    found: dict[Shape, list[bool]] = {}
    start = 0
    for shape in shapes:
        found[shape] = any_draw[start : start + shape.student]
        start += shape.student
    return found


@dataclass(frozen=True, eq=False)
class _MadeUp:
    """Made-up tokens of both sides, whose bytes make units of the shapes.

    Attributes:
        ids: The student's and the teacher's ids of each shape.
        vocabularies: The bytes of all ids of either side. The first `SHARED` are the same to both.
    """

    ids: tuple[list[list[int]], list[list[int]]]
    vocabularies: tuple[list[bytes], list[bytes]]

    @staticmethod
    def of(shapes: Sequence[Shape]) -> _MadeUp:
        """Makes them."""
        ids: tuple[list[list[int]], list[list[int]]] = ([], [])
        first = {STOP: b"", BLANK: b" "}
        known = tuple([first.get(token, b"=%d" % token) for token in range(SHARED)] for _ in range(2))
        for number, shape in enumerate(shapes):
            parts = _parts(shape, number)
            for found, pieces_V, ends in zip(ids, known, shape.layout, strict=True):
                if shape.matched:
                    found.append([BLANK if any(shape.blank) else 2 + number % (SHARED - 2)])
                    continue
                found.append(list(range(len(pieces_V), len(pieces_V) + len(ends))))
                begins = [0, *ends[:-1]]
                pieces_V += [b"".join(parts[begin:end]) for begin, end in zip(begins, ends, strict=True)]
            if shape.rewritten:
                known[1][-1] += b"~"
        return _MadeUp(ids, (known[0], known[1]))

    def tokens(self, side: int) -> Tensor:
        """The ids of one side of the whole batch."""
        return torch.tensor([token for own in self.ids[side] for token in own]).repeat(COPIES)


def _parts(shape: Shape, number: int) -> list[bytes]:
    """What stands between two neighbouring ends of a unit, of either side; the unit's number makes it unlike others."""
    own_ends, _ = shape.layout
    blank = shape.blank or (False,) * shape.student
    owner = [next(place for place, end in enumerate(own_ends) if part < end) for part in range(own_ends[-1])]
    return [
        b" " * (number + 1) + b"\t" * (part + 1) if blank[place] else b"<%d.%d>" % (number, part)
        for part, place in enumerate(owner)
    ]


def _gradient(method: Method, shapes: Sequence[Shape]) -> Tensor:
    """Whether the loss has a gradient at each step of the made-up batch, bool [N]."""
    made = _MadeUp.of(shapes)
    tokens_N, tokens_M = made.tokens(0), made.tokens(1)
    (vocab, width), drawn = map(len, made.vocabularies), torch.Generator().manual_seed(0)
    logits_NV, base_NV, logits_MV = (
        2 * torch.randn(len(own), size, dtype=torch.float64, generator=drawn)
        for own, size in ((tokens_N, vocab), (tokens_N, vocab), (tokens_M, width))
    )
    number_R = torch.arange(COPIES)
    rollout_N = number_R.repeat_interleave(len(tokens_N) // COPIES)
    inputs = BatchInputs(tokens_N, rollouts=rollout_N, groups=0 * number_R, rewards=(number_R % 2).double())
    batch = OneBatch.from_inputs(method, inputs, Clock(0, 1), None)
    signals: dict[str, TeacherSignal] = {
        name: _spans(made, shapes, tokens_N, tokens_M, logits_MV)
        if view.model == "teacher"
        else Dense.of(base_NV, tokens_N, source=name)
        for name, view in method.views.items()
    }
    logits_NV.requires_grad_()
    batch.evaluate(logits_NV, None, vocab, signals, len(tokens_N), None).loss.backward()
    assert logits_NV.grad is not None  # the loss reads them
    return (logits_NV.grad != 0).any(-1)


def _spans(made: _MadeUp, shapes: Sequence[Shape], tokens_N: Tensor, tokens_M: Tensor, logits_MV: Tensor) -> Spans:
    """The teacher's signal of units of some shapes, one after the other."""
    ends = [list(accumulate(sizes)) for sizes in zip(*[shape[:2] for shape in shapes] * COPIES, strict=True)]
    every = [*shapes] * COPIES
    units = [(slice(a - own, a), slice(b - other, b)) for a, b, (own, other, *_) in zip(*ends, every, strict=True)]
    same_S, stop_E = torch.arange(SHARED), torch.zeros(1).long()
    logp_M, raw_M = (x.gather(-1, tokens_M[:, None]).squeeze(-1) for x in (logits_MV.log_softmax(-1), logits_MV))
    columns, begins_N = unit_columns(units, tokens_N, tokens_M, logp_M, (same_S, same_S), teacher_raw_M=raw_M)
    prefixes = Prefixes(*made.vocabularies, (same_S, same_S), (stop_E, stop_E))
    width = logits_MV.shape[1]
    return Spans(
        tokens_N,
        "teacher",
        lambda rows: logits_MV[begins_N[rows]],
        width,
        **columns,  # type: ignore[arg-type]
        shared=(same_S, same_S),
        stops=(stop_E, stop_E),
        their_first_N=begins_N,
        theirs=TeacherTokens(tokens_M, logp_M, lambda index: logits_MV[index], width, prefixes=lambda: prefixes),
    )


def check_supervision(method: Method, found: Positions) -> Check:
    """Shows the share of the student's tokens and bytes that gets nothing from the teacher, method by method.

    Args:
        method: The run's method.
        found: The positions of the student's tokens.
    """
    why = (
        "a method that learns only from units of one token on each side says nothing about the others; a token that "
        "gets nothing is generated as before, also where it is wrong"
    )
    if not found.all_tokens:
        return Check("supervision", "ok", "the student generated no token to try it on", why)
    shapes = list(dict.fromkeys(shape for shape, _ in found.tokens))
    methods = {name: registry.load(name) for name in registry.for_two_tokenizers()} | {method.name: method}
    lost = {name: found.lost(taught(made, shapes)) for name, made in methods.items()}
    order = sorted(lost, key=lambda name: (lost[name], name))
    alike: dict[tuple[str, str], list[str]] = {}
    for name in order:
        alike.setdefault((f"{lost[name][0]:.1%}", f"{lost[name][1]:.1%}"), []).append(name)
    tokens, size = (f"{share:.1%}" for share in lost[method.name])
    saw = (
        f"with {method.name} {tokens} of the tokens that the student generated get nothing from the teacher, {size} of "
        f"their bytes ({found.all_tokens:,} tokens, {found.all_bytes:,} bytes); with each method, as its paper sets it:"
    )
    values = tuple((f"{name}/{what}", lost[name][i]) for name in order for i, what in enumerate(("tokens", "bytes")))
    rows = tuple((*shares, ", ".join(names)) for shares, names in alike.items())
    return Check("supervision", "ok", saw, why, values=values, table=(("tokens", "bytes", "method"), *rows))
