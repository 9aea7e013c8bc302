"""Texts that were written before scoring, as the report takes them from files that may be damaged."""

from __future__ import annotations

from typing import Any

import pytest

from retort.report.episodes import MOST_CHARACTERS
from retort.report.passages import MOST_PASSAGES, passages_of


def test_what_is_said_about_a_text() -> None:
    own = {"of": "debate", "model": "teacher_2", "round": 1, "text": "9", "confidence": 65.0, "step": 0, "cut": True}
    (found,) = passages_of({"passages": [own]})
    about = "debate · teacher_2 · round 2 · before turn 1 · 65 % sure · cut at its longest length"
    assert found == {"text": "9", "about": about}


@pytest.mark.parametrize("rows", [None, "x", {"text": "a"}, [], [None, 3, "x", {}, {"text": 5}]], ids=str)
def test_what_is_no_text_is_left_out(rows: Any) -> None:
    assert passages_of({"passages": rows}) == []


def test_odd_values_of_a_text_are_left_out() -> None:
    own = {"of": "rationale", "model": "student", "round": "1", "confidence": float("nan"), "step": True, "text": "so"}
    assert passages_of({"passages": [own]}) == [{"text": "so", "about": "rationale · student"}]


def test_a_page_holds_so_much_of_them() -> None:
    found = passages_of({"passages": [{"text": "x" * (MOST_CHARACTERS + 2000)}] * (MOST_PASSAGES + 1)})
    assert len(found) == MOST_PASSAGES
    assert found[0]["text"].endswith("x … 2,000 more characters")
