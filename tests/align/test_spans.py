"""Minimal units and anchor segments of lists of bytes."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.align.spans import anchored, units
from retort.errors import UserError

PROPERTY = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.large_base_example]
)


@st.composite
def cuts(draw: st.DrawFn, *, empty: bool = False) -> tuple[list[bytes], list[bytes]]:
    """Two ways of cutting one text into tokens; with `empty`, some of them have no bytes."""
    data = draw(st.text(min_size=1, max_size=12)).encode()

    def cut() -> list[bytes]:
        found, rest = [], data
        while rest:
            size = draw(st.integers(1, len(rest)))
            found += [b""] * (empty and draw(st.booleans())) + [rest[:size]]
            rest = rest[size:]
        return found + [b""] * (empty and draw(st.booleans()))

    return cut(), cut()


def ends(pieces: list[bytes]) -> set[int]:
    return set(accumulate(map(len, pieces)))


def joined(pieces: list[bytes], found: list[slice]) -> list[bytes]:
    return [b"".join(pieces[own]) for own in found]


@PROPERTY
@given(cuts())
def test_units_partition_the_bytes_at_the_common_boundaries_and_none_can_be_split(
    both: tuple[list[bytes], list[bytes]],
) -> None:
    ours, theirs = both
    found = units(ours, theirs)
    spelt = joined(ours, [one for one, _ in found])
    assert spelt == joined(theirs, [other for _, other in found])
    assert b"".join(spelt) == b"".join(ours)
    assert set(accumulate(map(len, spelt))) == ends(ours) & ends(theirs)
    for one, other in found:  # no boundary inside that both have
        assert not (ends(ours[one]) & ends(theirs[other])) - {len(b"".join(ours[one]))}
    for side, pieces in enumerate(both):  # neighbours touch, and all tokens are in
        slices = [pair[side] for pair in found]
        assert [one.start for one in slices] == [0, *(one.stop for one in slices[:-1])]
        assert slices[-1].stop == len(pieces)


@PROPERTY
@given(cuts(empty=True))
def test_tokens_without_bytes_are_in_exactly_one_unit(both: tuple[list[bytes], list[bytes]]) -> None:
    ours, theirs = both
    found = units(ours, theirs)
    plain = units([one for one in ours if one], [one for one in theirs if one])
    assert joined(ours, [one for one, _ in found]) == joined([p for p in ours if p], [one for one, _ in plain])
    for side, pieces in enumerate(both):
        assert [index for pair in found for index in range(len(pieces))[pair[side]]] == list(range(len(pieces)))


@PROPERTY
@given(cuts())
def test_a_tokenization_and_itself_are_one_to_one(both: tuple[list[bytes], list[bytes]]) -> None:
    ours, _ = both
    expected = [(slice(i, i + 1), slice(i, i + 1)) for i in range(len(ours))]
    assert units(ours, ours) == units(ours, ours, mode="anchor") == expected


@PROPERTY
@given(cuts())
def test_anchor_segments_are_minimal_units_joined_up_to_a_match(both: tuple[list[bytes], list[bytes]]) -> None:
    ours, theirs = both
    minimal, found = units(ours, theirs), units(ours, theirs, mode="anchor")
    matches = [pair for pair in minimal if pair[0].stop - pair[0].start == pair[1].stop - pair[1].start == 1]
    assert [(a.stop, b.stop) for a, b in found] == [(a.stop, b.stop) for a, b in matches]
    assert [(a.start, b.start) for a, b in found] == [(0, 0), *((a.stop, b.stop) for a, b in found[:-1])][: len(found)]


def test_by_hand() -> None:
    ours, theirs = [b"ab", b"c", b"d"], [b"a", b"bc", b"d"]
    assert units(ours, theirs) == [(slice(0, 2), slice(0, 2)), (slice(2, 3), slice(2, 3))]
    assert units(ours, theirs, mode="anchor") == [(slice(0, 3), slice(0, 3))]
    # A character in two tokens, and a teacher that goes on.
    assert units([b"\xc3", b"\xa9"], ["é".encode(), b"!"]) == [(slice(0, 2), slice(0, 1))]
    # What is behind the last common boundary is left out, with the empty token before it.
    assert units([b"a", b"", b"bc"], [b"a", b"b"]) == [(slice(0, 1), slice(0, 1))]
    # An empty token goes with what follows it, at the end with the last unit.
    assert units([b"", b"a", b"", b"b", b""], [b"a", b"b"]) == [(slice(0, 2), slice(0, 1)), (slice(2, 5), slice(1, 2))]
    assert units([], []) == units([b"a"], []) == units([b""], [b""]) == []
    # A segment without a match at its end is left out.
    assert units([b"a", b"bc"], [b"a", b"b", b"c"], mode="anchor") == [(slice(0, 1), slice(0, 1))]
    assert anchored([(slice(0, 2), slice(0, 1)), (slice(3, 4), slice(1, 2))]) == [(slice(3, 4), slice(1, 2))]


def test_a_control_piece_aligns_with_nothing_but_itself() -> None:
    stop = b"\xff<stop>"
    assert units([b"a", stop], [b"a", stop])[-1] == (slice(1, 2), slice(1, 2))
    with pytest.raises(UserError, match="from byte 1 on"):
        units([b"a", stop], [b"a", b"<stop>"])


def test_bytes_that_differ_are_refused_and_named() -> None:
    with pytest.raises(UserError, match=r"different bytes from byte 3 on, b'abcd' and b'abcef'; tokens can be aligned"):
        units([b"ab", b"cd"], [b"abce", b"f"])
    with pytest.raises(ValueError, match="'anchors' is no way to cut into units; did you mean 'anchor'"):
        units([b"a"], [b"a"], mode="anchors")  # type: ignore[arg-type]


def test_a_long_text_takes_no_longer_per_byte() -> None:
    """By counting: the number of pieces that are looked at grows as the text does, not with its square."""
    looks = 0

    class Looked(bytes):
        def __len__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__len__()

    counts = []
    for size in (100, 200):
        looks = 0
        units([Looked(b"a")] * size, [Looked(b"aa")] * (size // 2))
        counts.append(looks)
    assert 0 < counts[1] <= 2 * counts[0]
