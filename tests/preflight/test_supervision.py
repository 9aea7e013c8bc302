"""Which of the student's tokens a method learns from, by the shape of their unit."""

from __future__ import annotations

import pytest

from retort import registry
from retort.method import Method
from retort.preflight.supervision import Positions, Shape, check_supervision, taught

MATCHED, SINGLE, WIDE, LONG = Shape(1, 1, True), Shape(1, 1, False), Shape(1, 2, False), Shape(3, 2, False)
SHAPES: list[Shape] = [MATCHED, SINGLE, WIDE, LONG]
EVERYWHERE = {MATCHED: [True], SINGLE: [True], WIDE: [True], LONG: [True] * 3}
STRICT = {MATCHED: [True], SINGLE: [False], WIDE: [False], LONG: [False] * 3}
FIRST = {MATCHED: [True], SINGLE: [True], WIDE: [True], LONG: [True, False, False]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("strict_ct", STRICT),
        ("simple_ctkd", STRICT),
        ("uld", FIRST),
        ("gold", EVERYWHERE),  # the later tokens of a unit are factors of its probability
        ("bpm", EVERYWHERE),
        ("simct", EVERYWHERE),
        ("alm", EVERYWHERE),
        ("opd", EVERYWHERE),
        ("gopd", EVERYWHERE),  # with a base model besides
        ("uni_opd", EVERYWHERE),  # with rewards; it leaves out tokens by their numbers, which is no matter of units
    ],
)
def test_what_a_method_learns_from(name: str, expected: dict[Shape, list[bool]]) -> None:
    assert taught(registry.load(name), SHAPES) == expected


def test_what_bpm_leaves_out_of_a_unit() -> None:
    """Whitespace, what ends inside of a later token of the teacher's, and units that the teacher spells otherwise."""
    later = Shape.of([b"ab", b"cde", b"f"], [b"a", b"bcd", b"ef"], matched=False)
    inside = Shape.of([b"a", b"bc"], [b"ab", b"c"], matched=False)
    spaces = Shape.of([b"a", b"  ", b"b"], [b"a  b"], matched=False)
    space, rewritten = Shape.of([b" "], [b" "], matched=True), Shape.of([b"A", b"b"], [b"ab"], matched=False)
    assert later.ends == ((2, 4, 5), (1, 3, 5)) and spaces.blank == (False, True, False) and rewritten.rewritten
    expected = {
        later: [False, False, True],
        inside: [True, True],
        spaces: [True, False, True],
        space: [False],
        rewritten: [False, False],
    }
    assert taught(registry.load("bpm"), [MATCHED, *expected]) == {MATCHED: [True], **expected}
    kept = taught(registry.load("bpm", whitespace=True), list(expected))
    assert kept == {**expected, spaces: [True] * 3, space: [True]}
    everywhere = {shape: [True] * shape.student for shape in expected}
    assert taught(registry.load("opd"), list(expected)) == everywhere
    assert taught(registry.load("simct"), list(expected)) == everywhere


def test_every_listed_method_learns_from_matched_tokens() -> None:
    for name in registry.for_two_tokenizers():
        assert taught(registry.load(name), [MATCHED, LONG])[MATCHED] == [True], name


def made() -> tuple[Positions, Method]:
    found = Positions(outside=(1, 4))
    for shape, index, tokens, size in ((MATCHED, 0, 5, 10), (LONG, 0, 2, 2), (LONG, 1, 2, 3), (LONG, 2, 2, 5)):
        found.tokens[shape, index], found.bytes[shape, index] = tokens, size
    return found, registry.load("uld")


def test_shares_of_tokens_and_bytes_that_get_nothing() -> None:
    found, _ = made()
    assert (found.all_tokens, found.all_bytes) == (12, 24)
    assert found.lost(FIRST) == (5 / 12, 12 / 24)
    assert found.lost(EVERYWHERE) == (1 / 12, 4 / 24)
    assert found.lost(STRICT) == (7 / 12, 14 / 24)


def test_one_table_of_all_methods() -> None:
    found, method = made()
    check = check_supervision(method, found)
    assert check.saw.startswith("with uld 41.7% of the tokens that the student generated get nothing")
    assert check.table[0] == ("tokens", "bytes", "method")
    listed = {name: row[:2] for row in check.table[1:] for name in row[2].split(", ")}
    assert listed["opd"] == ("8.3%", "16.7%")
    assert listed["strict_ct"] == ("58.3%", "58.3%")
    assert sorted(listed) == registry.for_two_tokenizers()
    assert [float(row[0].rstrip("%")) for row in check.table[1:]] == sorted(
        float(row[0].rstrip("%")) for row in check.table[1:]
    )
    assert check_supervision(method, Positions()).saw == "the student generated no token to try it on"


def test_no_token_in_any_unit() -> None:
    check = check_supervision(registry.load("uld"), Positions(outside=(3, 6)))
    assert check.saw.startswith("with uld 100.0% of the tokens that the student generated get nothing from the teacher")
    assert {row[:2] for row in check.table[1:]} == {("100.0%", "100.0%")}
