"""Minimal units of two tokenizations of the same bytes.

Everything here is about bytes, never about text: a token may hold a part of a character. `retort.align.pieces` finds
the bytes of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from retort.errors import UserError, did_you_mean

__all__ = ["Mode", "Unit", "anchored", "units"]

Mode = Literal["minimal", "anchor"]
#: Tokens of the student and tokens of the teacher that spell the same bytes.
Unit = tuple[slice, slice]

#: Bytes that a message shows on either side of a difference.
_SHOWN = 12


def units(student: Sequence[bytes], teacher: Sequence[bytes], mode: Mode = "minimal") -> list[Unit]:
    r"""Cuts two tokenizations of the same bytes into units that both can express.

    A byte offset at which a token ends on both sides is a common boundary. Minimal units end at every common boundary,
    so none of them can be split. Anchor segments end only behind a unit of one token on each side, which they include:
    for `ab|c|d` and `a|bc|d` the minimal units are `abc` and `d`, and the only segment is `abcd`.

    What lies behind the last common boundary (of a segment: behind the last unit of one token on each side) is left
    out. A token without bytes belongs to the unit of the token that follows it; behind the last byte of its side it
    belongs to the last unit. The time is linear in the number of bytes.

    Args:
        student: Bytes of each of the student's N_S tokens.
        teacher: Bytes of each of the teacher's N_T tokens.
        mode: `minimal` or `anchor`.

    Returns:
        For each unit, in order, a slice of the student's tokens and a slice of the teacher's; neighbours touch.

    Raises:
        UserError: An unknown mode, or bytes that differ before one side ends. It is a `ValueError`, too.

    Example:
        >>> from retort.align.spans import units
        >>> units([b"ab", b"c", b"d"], [b"a", b"bc", b"d"])
        [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(2, 3, None))]
        >>> units([b"ab", b"c", b"d"], [b"a", b"bc", b"d"], mode="anchor")
        [(slice(0, 3, None), slice(0, 3, None))]
        >>> units([b"\xf0\x9f", b"\x99\x82"], [b"\xf0\x9f\x99\x82", b"!"])
        [(slice(0, 2, None), slice(0, 1, None))]
    """
    if mode not in ("minimal", "anchor"):
        raise UserError(f"'{mode}' is no way to cut into units; {did_you_mean(mode, ('minimal', 'anchor'))}")
    _check_same(b"".join(student), b"".join(teacher))
    ours, theirs = _ends(student), _ends(teacher)
    found: list[Unit] = []
    here = there = 0
    for offset, end in ours.items():
        other = theirs.get(offset)
        if other is not None:
            found.append((slice(here, end), slice(there, other)))
            here, there = end, other
    if found:  # what is empty to the end belongs to the last unit
        here = here if any(student[here:]) else len(student)
        there = there if any(teacher[there:]) else len(teacher)
        found[-1] = (slice(found[-1][0].start, here), slice(found[-1][1].start, there))
    return found if mode == "minimal" else anchored(found)


def anchored(minimal: Sequence[Unit]) -> list[Unit]:
    """Joins minimal units into segments, each of which ends with a unit of one token on each side.

    Args:
        minimal: Minimal units in order. Where two neighbours do not touch, a segment that is open ends there and is
            left out.

    Returns:
        The segments, in order.
    """
    found: list[Unit] = []
    opened: Unit | None = None
    for ours, theirs in minimal:
        touches = opened is not None and (opened[0].stop, opened[1].stop) == (ours.start, theirs.start)
        first = opened if opened is not None and touches else (ours, theirs)
        opened = (slice(first[0].start, ours.stop), slice(first[1].start, theirs.stop))
        if ours.stop - ours.start == theirs.stop - theirs.start == 1:
            found.append(opened)
            opened = None
    return found


def _ends(pieces: Sequence[bytes]) -> dict[int, int]:
    """For each byte offset at which a token ends, the number of tokens up to there; tokens without bytes end none."""
    found: dict[int, int] = {}
    offset = 0
    for count, piece in enumerate(pieces, 1):
        offset += len(piece)
        if piece:
            found[offset] = count
    return found


def _check_same(ours: bytes, theirs: bytes) -> None:
    common = min(len(ours), len(theirs))
    if ours[:common] == theirs[:common]:
        return
    differing = next(offset for offset in range(common) if ours[offset] != theirs[offset])
    near = slice(max(0, differing - _SHOWN), differing + _SHOWN)
    raise UserError(
        f"student and teacher spell different bytes from byte {differing} on, {ours[near]!r} and {theirs[near]!r}; "
        "tokens can be aligned only where both spell the same bytes"
    )
