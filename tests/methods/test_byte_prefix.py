"""Byte-prefix marginalisation: a slow reference over all tokens, and what must hold of any vocabularies."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from two_tokenizers import Pair

from retort.align.prefixes import Prefixes
from retort.core import chunked
from retort.core.distribution import Distribution
from retort.core.losses import TokenLosses
from retort.core.signals import Spans
from retort.divergences.byte_prefix import prefix_table, projected
from retort.errors import SignalError, UserError
from retort.functional import cross_token_losses, linear_token_losses, token_losses
from retort.loss.two_tokenizers import TwoTokenizations
from retort.registry import load

F64 = torch.float64
#: The bytes of all ids; the last of the student's and the two last of the teacher's are control tokens. The student has
#: no token for `z`, and two for `ba`.
OURS = [b"a", b"b", b"ab", b"ba", b"aab", b" ", b" a", b"ba", b"bab", b""]
THEIRS = [b"a", b"b", b"aa", b"abb", b"ba", b" ", b" ab", b"az", b"bb", b"", b""]
STOPS = ([9], [9])
SHARED = [(0, 0), (1, 1), (5, 5), (9, 9)]
MODES = ("forward_kl", "reverse_kl", "jsd")


def cut(text: bytes, vocabulary: list[bytes], draw: random.Random) -> list[int]:
    """The text in random tokens."""
    found: list[int] = []
    while text:
        fits = [token for token, piece in enumerate(vocabulary) if piece and text.startswith(piece)]
        found.append(draw.choice(fits))
        text = text[len(vocabulary[found[-1]]) :]
    return found


class World:
    """Texts in random tokens of two models with random heads; the first text ends in a stop, the second is cut off."""

    def __init__(self, seed: int = 0, texts: tuple[bytes, ...] = (b"aab abbab aba", b" bab abb a", b"bb ab a")) -> None:
        draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        self.ids: tuple[list[int], list[int]] = ([], [])
        self.pieces: tuple[list[bytes], list[bytes]] = ([], [])
        self.rollouts: tuple[list[int], list[int]] = ([], [])
        for rollout, text in enumerate(texts):
            for side, vocabulary in enumerate((OURS, THEIRS)):
                own = cut(text, vocabulary, draw) + ([9] if rollout == 0 else [])
                self.ids[side].extend(own)
                self.pieces[side].extend(vocabulary[token] or b"\xff<stop>" for token in own)
                self.rollouts[side].extend([rollout] * len(own))
        count, others = map(len, self.ids)
        self.hidden = torch.randn(count, 4, generator=numbers, dtype=F64).requires_grad_()
        self.head = torch.randn(len(OURS), 4, generator=numbers, dtype=F64).requires_grad_()
        self.teacher = torch.randn(others, len(THEIRS), generator=numbers, dtype=F64)

    def losses(self, **more: Any) -> TokenLosses:
        settings = {key: more.pop(key) for key in list(more) if key in ("divergence", "whitespace", "stop_coef")}
        given: dict[str, Any] = {
            "student_logits": self.hidden @ self.head.T,
            "teacher_logits": self.teacher,
            "student_tokens": torch.tensor(self.ids[0]),
            "teacher_tokens": torch.tensor(self.ids[1]),
            "student_pieces": self.pieces[0],
            "teacher_pieces": self.pieces[1],
            "student_rollouts": torch.tensor(self.rollouts[0]),
            "teacher_rollouts": torch.tensor(self.rollouts[1]),
            "shared": SHARED,
            "stops": STOPS,
            "vocabularies": (OURS, THEIRS),
            **more,
        }
        return cross_token_losses(load("bpm", **settings), **given)

    def signal(self) -> Spans:
        both = TwoTokenizations.of(
            (torch.tensor(self.ids[0]), torch.tensor(self.ids[1])),
            self.pieces,
            (torch.tensor(self.rollouts[0]), torch.tensor(self.rollouts[1])),
            SHARED,
            STOPS,
            "minimal",
            (OURS, THEIRS),
        )
        return both.spans(self.teacher, 1.0, len(OURS))

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, (self.hidden, self.head))


# --- the slow reference ---


def longest(text: bytes) -> int | None:
    """The student's longest token that a text begins with; the lower id of two."""
    fits = [token for token, piece in enumerate(OURS) if piece and text.startswith(piece)]
    return min(fits, key=lambda token: (-len(OURS[token]), token)) if fits else None


def target(p: Tensor, written: bytes) -> tuple[dict[int | None, float], float]:
    """The teacher's probability of each of the student's tokens (None: of no token), and that of what is written."""
    inside = [v for v, piece in enumerate(THEIRS) if (piece.startswith(written) if written else True)]
    mass = float(sum(p[v] for v in inside))
    found: dict[int | None, float] = {}
    for v in inside:
        meant = longest(THEIRS[v][len(written) :])
        if not written and v in STOPS[1]:
            meant = STOPS[0][0]
        found[meant] = found.get(meant, 0.0) + float(p[v]) / mass
    return found, mass


def targets(world: World) -> dict[int, dict[int | None, float]]:
    """By step, where there is one."""
    found: dict[int, dict[int | None, float]] = {}
    p_MV = world.teacher.softmax(-1)
    for rollout in sorted(set(world.rollouts[0])):
        steps, places = ([i for i, r in enumerate(side) if r == rollout] for side in world.rollouts)
        ends: list[list[int]] = [[], []]
        for side, own in enumerate((steps, places)):
            for index in own:
                before = ends[side][-1] if ends[side] else 0
                ends[side].append(before + len((OURS, THEIRS)[side][world.ids[side][index]]))
        common = {0, *ends[0]} & {0, *ends[1]}
        for order, step in enumerate(steps):
            token = world.ids[0][step]
            if not OURS[token]:
                continue
            begin, end = ends[0][order] - len(OURS[token]), ends[0][order]
            if not any(other >= end for other in common):
                continue  # behind the last common boundary
            first = next(i for i, other in enumerate(ends[1]) if other > begin)
            at = places[first]
            written = THEIRS[world.ids[1][at]][: begin - (ends[1][first - 1] if first else 0)]
            t, mass = target(p_MV[at], written)
            if end > ends[1][first]:
                if end not in ends[1]:
                    continue
                last = next(i for i, other in enumerate(ends[1]) if other == end)
                chain = (
                    math.prod(float(p_MV[places[i], world.ids[1][places[i]]]) for i in range(first, last + 1)) / mass
                )
                meant = longest(THEIRS[world.ids[1][at]][len(written) :])
                t[meant] -= chain
                t[token] = t.get(token, 0.0) + chain
            found[step] = t
    return found


def slowly(world: World, divergence: str, *, whitespace: bool = False) -> Tensor:
    """The values of all steps, live."""
    logits = world.hidden @ world.head.T
    values = [torch.zeros((), dtype=F64) for _ in world.ids[0]]
    for step, t in targets(world).items():
        if OURS[world.ids[0][step]].isspace() and not whitespace:
            continue
        p = logits[step].softmax(-1)
        sure = {u: x for u, x in t.items() if u is not None and x > 0}
        placed = sum(sure.values())
        if not placed:
            continue
        t_V = torch.tensor([sure.get(u, 0.0) / placed for u in range(len(OURS))], dtype=F64)
        on = t_V > 0
        if divergence == "forward_kl":
            value = (t_V[on] * (t_V[on].log() - p[on].log())).sum()
        elif divergence == "reverse_kl":
            own = p[on] / p[on].sum()
            value = (own * (own.log() - t_V[on].log())).sum()
        else:
            mean = (t_V + p) / 2
            value = 0.5 * (t_V[on] * (t_V[on] / mean[on]).log()).sum() + 0.5 * (p * (p / mean).log()).sum()
        values[step] = placed * value
    return torch.stack(values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("divergence", MODES)
def test_value_and_gradient_are_those_of_a_loop_over_all_tokens(divergence: str, seed: int) -> None:
    world = World(seed)
    ours = world.losses(divergence=divergence, stop_coef=0.0).terms["divergence"].value
    theirs = slowly(world, divergence)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weights = torch.rand(len(ours), generator=torch.Generator().manual_seed(1), dtype=F64)
    for one, other in zip(
        world.gradients((ours * weights).sum()), world.gradients((theirs * weights).sum()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_worlds_have_every_kind_of_place() -> None:
    """Else the reference above would prove less than it seems."""
    inside = beyond = left_out = 0
    for seed in range(4):
        world = World(seed)
        table = prefix_table(world.signal().rows(slice(None)).units)[0]
        own, theirs = world.signal(), torch.tensor(world.ids[1])
        for first in own.first_N.nonzero().squeeze(-1).tolist():
            assert own.place_N is not None
            place, count = int(own.place_N[first]), int(own.theirs_N[first])
            found = table.places(
                world.ids[0][first : first + int(own.own_N[first])], theirs[place : place + count].tolist()
            )
            inside += sum(1 for one in found if one is not None and one.prefix)
            beyond += sum(1 for one in found if one is not None and one.beyond)
            left_out += sum(1 for one in found if one is None)
    assert min(inside, beyond, left_out) >= 3


def test_whitespace_counts_only_if_asked_for() -> None:
    world = World(1)
    blanks = torch.tensor([OURS[token].isspace() for token in world.ids[0]])
    masked, whole = (world.losses(whitespace=on).terms["divergence"].value for on in (False, True))
    assert not masked[blanks].any()
    torch.testing.assert_close(whole, slowly(world, "forward_kl", whitespace=True), rtol=1e-11, atol=1e-12)
    assert bool((whole[blanks] > 0).any())


def test_the_bridge_between_stops() -> None:
    world = World(0)
    stop = world.losses().terms["stop"].value.detach()
    place = world.ids[0].index(9)
    q = float(world.teacher[world.ids[1].index(9)].softmax(-1)[STOPS[1]].sum())
    p = float((world.hidden @ world.head.T).detach()[place].softmax(-1)[STOPS[0]].sum())
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert float(stop[place]) == pytest.approx(expected, abs=1e-12)
    assert int((stop != 0).sum()) == 1
    assert not world.losses(stops=None).terms["stop"].value.any()
    assert float(world.losses().terms["divergence"].value[place].detach()) == 0


# --- what must hold ---


def rows_of(seed: int, written: bytes, count: int = 3) -> tuple[Distribution, Prefixes]:
    draw = torch.Generator().manual_seed(seed)
    own, their = (torch.tensor(ids) for ids in zip(*SHARED, strict=True))
    table = Prefixes(OURS, THEIRS, (own, their), (torch.tensor(STOPS[0]), torch.tensor(STOPS[1])))
    return Distribution(torch.randn(count, len(THEIRS), generator=draw, dtype=F64)), table


@pytest.mark.parametrize("written", [b"", b"a", b"ab", b" ", b"b"])
def test_no_probability_is_lost(written: bytes) -> None:
    teacher, table = rows_of(2, written)
    theirs = World(0).signal().theirs
    assert theirs is not None
    found = projected(teacher, [(written, 0)] * 3, table, theirs, torch.zeros(3).long(), torch.zeros(3).long())
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=F64), rtol=0, atol=1e-14)
    assert bool((found >= 0).all())


def test_no_probability_is_lost_where_a_token_stands_for_several() -> None:
    for seed in range(4):
        for step, t in targets(World(seed)).items():
            assert sum(t.values()) == pytest.approx(1.0, abs=1e-12), step
    world = World(0, texts=(b"ab",))
    world.ids[0][:], world.ids[1][:] = [2, 9], [0, 1, 9]  # `ab` on this side, `a` and `b` on the other
    world.pieces[0][:], world.pieces[1][:] = [b"ab", b"\xff<stop>"], [b"a", b"b", b"\xff<stop>"]
    world.rollouts[0][:], world.rollouts[1][:] = [0, 0], [0, 0, 0]
    world.teacher = torch.randn(3, len(THEIRS), dtype=F64, generator=torch.Generator().manual_seed(0))
    theirs = world.signal().theirs
    assert theirs is not None
    assert theirs.prefixes is not None
    zero = torch.zeros(1).long()
    plain, moved = (
        projected(theirs.distribution(zero), [(b"", count)], theirs.prefixes(), theirs, zero, torch.tensor([2]))[0]
        for count in (0, 2)
    )
    chain = float(world.teacher.softmax(-1)[0, 0] * world.teacher.softmax(-1)[1, 1])
    assert float(moved[2] - plain[2]) == pytest.approx(chain, abs=1e-14)
    assert float(plain[0] - moved[0]) == pytest.approx(chain, abs=1e-14)
    assert float(moved.sum()) == pytest.approx(1.0, abs=1e-14)


def test_nothing_written_is_a_boundary() -> None:
    """The form inside of a token gives that at a boundary if no byte is written; of tokens that spell something."""
    table = rows_of(0, b"")[1]
    ids, meant = table.inside(b"")
    assert sorted(ids.tolist()) == [v for v, piece in enumerate(THEIRS) if piece]
    assert meant.tolist() == table.root_V[ids].tolist()
    assert table.root_V[9:].tolist() == [9, table.residual]
    assert [table.meaning(b"", v) for v in range(len(THEIRS))] == table.root_V.tolist()


def test_the_bytes_of_a_token_are_written_one_after_another() -> None:
    """The probability of a prefix is that of the tokens that end there and of all prefixes that are a byte longer."""
    teacher, table = rows_of(3, b"", 1)
    p = teacher.p_CV[0]

    @cache
    def mass(prefix: bytes) -> float:
        return float(p[table.inside(prefix)[0]].sum())

    for piece in THEIRS:
        for length in range(len(piece)):
            here = piece[:length]
            longer = sum(mass(here + bytes([byte])) for byte in b"abz ")
            ends = float(sum(p[v] for v, other in enumerate(THEIRS) if other and other == here))
            assert mass(here) == pytest.approx(longer + ends, abs=1e-15)
        if piece:
            steps = math.prod(mass(piece[: n + 1]) / mass(piece[:n]) for n in range(len(piece)))
            assert steps * mass(b"") == pytest.approx(mass(piece), abs=1e-15)


@pytest.mark.parametrize("given", [None, "vocabularies"])
@pytest.mark.parametrize("divergence", MODES)
def test_with_one_tokenizer_it_is_the_divergence_over_the_whole_vocabulary(divergence: str, given: str | None) -> None:
    draw = torch.Generator().manual_seed(4)
    student = torch.randn(5, 6, generator=draw, dtype=F64).requires_grad_()
    teacher = torch.randn(5, 6, generator=draw, dtype=F64)
    tokens = torch.tensor([0, 3, 1, 5, 3])
    known = [bytes([97 + token]) for token in range(6)]

    def loss(teacher: Tensor) -> Tensor:
        return cross_token_losses(
            load("bpm", divergence=divergence),
            student_logits=student,
            teacher_logits=teacher,
            student_tokens=tokens,
            teacher_tokens=tokens,
            student_pieces=[known[token] for token in tokens],
            teacher_pieces=[known[token] for token in tokens],
            shared=[(token, token) for token in range(6)],
            vocabularies=None if given is None else (known, known),
        ).loss

    expected = token_losses(
        load("gkd", divergence=divergence), student_logits=student, teacher_logits=teacher, tokens=tokens
    ).loss
    ours = loss(teacher)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(one, student)[0] for one in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
    nothing = loss(student.detach())
    assert float(nothing.detach().abs()) < 1e-13
    assert float(torch.autograd.grad(nothing, student)[0].abs().max()) < 1e-13


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_any_chunk_and_block_gives_the_same_value_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2)
    given: dict[str, Any] = {"tokens": torch.tensor(world.ids[0]), "rollouts": torch.tensor(world.rollouts[0])}
    method = load("bpm", stop_coef=0.5)
    dense = token_losses(
        method, student_logits=world.hidden @ world.head.T, teacher_logits=world.signal(), **given
    ).loss
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 3 * len(OURS))
    linear = linear_token_losses(
        method,
        student_hidden=world.hidden,
        student_head=world.head,
        extra_views={"teacher": world.signal()},
        chunk=chunk,
        **given,
    ).loss
    torch.testing.assert_close(linear, dense, rtol=1e-12, atol=1e-12)
    for one, other in zip(world.gradients(linear), world.gradients(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_teacher_that_rewrites_is_not_compared_where_it_does() -> None:
    """The teacher reads `b` where the student wrote `a`, as one that normalises would."""
    world = World(0, texts=(b"ab",))
    world.ids[0][:], world.ids[1][:] = [0, 1, 9], [1, 1, 9]
    world.pieces[0][:], world.pieces[1][:] = ([b"a", b"b", b"\xff<stop>"] for _ in range(2))
    world.rollouts[0][:], world.rollouts[1][:] = [0, 0, 0], [0, 0, 0]
    world.hidden = world.hidden[:1].detach().repeat(3, 1).requires_grad_()
    world.teacher = world.teacher[:1].repeat(3, 1)
    assert (world.losses().terms["divergence"].value > 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vocabularies": None}, "give vocabularies="),
        ({"vocabularies": (OURS[1:], THEIRS)}, "bytes of 9 student's ids, of which there are 10"),
        ({"vocabularies": (OURS, [*THEIRS, b"c"])}, "bytes of 12 teacher's ids, of which there are 11"),
    ],
)
def test_bytes_that_are_missing_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World().losses(**more)


def test_other_cuts_of_one_vocabulary_need_all_bytes() -> None:
    logits = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(UserError, match="begins inside of one of the teacher's"):
        cross_token_losses(
            "bpm",
            student_logits=logits,
            teacher_logits=logits[:1],
            student_tokens=torch.tensor([0, 1]),
            teacher_tokens=torch.tensor([2]),
            student_pieces=[b"a", b"b"],
            teacher_pieces=[b"ab"],
            shared=[(token, token) for token in range(3)],
        )


def test_a_signal_that_does_not_know_bytes_is_refused() -> None:
    with pytest.raises(SignalError, match="which bytes its tokens spell"):
        Pair().dense("bpm")
