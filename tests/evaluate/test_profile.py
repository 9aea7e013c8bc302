"""Where entropy and disagreement lie: bins, means, and what was not measured."""

from __future__ import annotations

import math

import pytest
import torch

from retort.evaluate.profile import ENTROPY_BINS, TURNS, Profile, position_bins


def test_short_answers_have_a_bin_for_every_place() -> None:
    assert position_bins(14) == list(range(14))
    assert position_bins(24) == list(range(24))


@pytest.mark.parametrize("longest", [25, 100, 4096, 38_912])
def test_long_answers_have_two_bins_an_octave_that_cover_them(longest: int) -> None:
    lower = position_bins(longest)
    assert lower[0] == 0
    assert lower == sorted(set(lower))
    assert lower[-1] < longest <= 2 * lower[-1]
    assert len(lower) <= 2 * math.log2(longest) + 3


def test_every_token_is_in_the_bin_whose_lower_end_it_has_reached() -> None:
    profile = Profile(longest=4)
    entropy_N = torch.tensor([0.0, 0.05, 0.1, 0.15, 12.5, 14.0, 11.0], dtype=torch.float64)
    profile.add({"student_entropy": entropy_N}, torch.tensor([0, 1, 2, 3, 3, 3, 3]))
    counts = profile.plain()["histogram"]["student_entropy"]
    assert len(counts) == len(ENTROPY_BINS)
    assert (counts[0], counts[1], counts[110], counts[-1], sum(counts)) == (2, 2, 1, 2, 7)
    assert ENTROPY_BINS[-1] >= math.log(262_144), "the largest vocabulary has bins of its own"


def test_means_by_place_and_by_what_the_teacher_is_unsure_of() -> None:
    profile = Profile(longest=3)
    for part in (slice(0, 2), slice(2, 5)):  # in two pieces, as the judge adds them
        values = {
            "teacher_entropy": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])[part],
            "forward_kl": torch.tensor([0.1, 0.5, 0.7, 0.3, 1.5])[part],
        }
        profile.add(values, torch.tensor([0, 1, 1, 0, 2])[part])
    found = profile.plain()
    assert found["by_position"]["tokens"] == [2, 2, 1]
    assert found["by_position"]["forward_kl"] == pytest.approx([0.2, 0.6, 1.5])
    by_entropy = found["by_teacher_entropy"]
    assert by_entropy["tokens"][0] == 2
    assert by_entropy["forward_kl"][0] == pytest.approx(0.2)
    assert by_entropy["forward_kl"][10] == pytest.approx(0.9)
    assert by_entropy["forward_kl"][5] is None, "no token fell there"


def test_what_was_not_measured_is_not_there_and_what_is_infinite_is_null() -> None:
    profile = Profile(longest=1)
    profile.add({"student_entropy": torch.tensor([0.3]), "reverse_kl": torch.tensor([math.inf])}, torch.tensor([0]))
    found = profile.plain()
    assert "by_teacher_entropy" not in found
    assert "teacher_entropy" not in found["histogram"]
    assert found["by_position"]["reverse_kl"] == [None]


def test_turns_are_averaged_and_the_last_one_holds_all_later_ones() -> None:
    profile = Profile(longest=4)
    values = {"reverse_kl": torch.tensor([0.5, 1.5, 2.0, 4.0])}
    profile.add(values, torch.arange(4), torch.tensor([0, 0, 1, 2]))
    assert profile.plain()["by_turn"] == {"from": [1, 2, 3], "tokens": [2, 1, 1], "reverse_kl": [1.0, 2.0, 4.0]}
    turn_N = torch.arange(TURNS + 2)
    profile = Profile(longest=TURNS + 2)
    profile.add({"reverse_kl": turn_N.double()}, turn_N, turn_N)
    found = profile.plain()["by_turn"]
    assert (len(found["from"]), found["tokens"][-1], found["reverse_kl"][-1]) == (TURNS, 3, TURNS)


@pytest.mark.parametrize("turn_N", [None, torch.zeros(2, dtype=torch.long)], ids=["not given", "one turn"])
def test_completions_of_one_turn_have_no_turns(turn_N: torch.Tensor | None) -> None:
    profile = Profile(longest=2)
    profile.add({"reverse_kl": torch.ones(2)}, torch.arange(2), turn_N)
    assert "by_turn" not in profile.plain()
