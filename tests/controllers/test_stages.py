"""Controllers that switch: lengths by entropy, the student's share by validation loss."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from retort.controllers import Controller, Probe
from retort.controllers.lengths import LengthStages, length_stages
from retort.controllers.off_policy import adaptive_share
from retort.errors import UserError

LADDER = (128, 256, 512, 1024)
DRAW = torch.Generator()


def course(stages: LengthStages, entropies: list[float]) -> list[float]:
    """The horizon before the first probe and after each."""
    state = stages.init(DRAW)
    found = [stages.numbers(state)["horizon"]]
    for entropy in entropies:
        state = stages.probed(state, {"entropy": entropy})
        found.append(stages.numbers(state)["horizon"])
    return found


def test_a_stage_is_left_only_at_the_threshold_and_never_after_a_failure() -> None:
    stages = length_stages(LADDER, min_entropy=0.05)
    assert course(stages, [0.2, 0.05, 0.049, 9.0, 9.0]) == [128, 256, 512, 512, 512, 512]
    assert course(stages, [0.2] * 6) == [128, 256, 512, 1024, 1024, 1024, 1024]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        entropies = (0.1 * torch.rand(8, generator=draw)).tolist()
        found = course(stages, entropies)
        failed = False
        for entropy, (one, two) in zip(entropies, pairwise(found), strict=True):
            failed = failed or entropy < 0.05
            assert two >= one
            assert two == one or not failed


def test_the_ends_of_the_threshold_are_a_plain_schedule_and_a_fixed_length() -> None:
    assert course(length_stages(LADDER, min_entropy=float("-inf")), [0.0] * 4) == [128, 256, 512, 1024, 1024]
    assert course(length_stages(LADDER, min_entropy=float("inf")), [9.0] * 4) == [128] * 5


def test_without_a_threshold_it_is_a_share_of_the_first_entropy() -> None:
    assert course(length_stages(LADDER, share=0.5), [0.2, 0.1, 0.099]) == [128, 256, 512, 512]


def test_both_ways_to_go_on_after_a_failure() -> None:
    for on_failure, ends in (("hold", False), ("terminate", True)):
        stages = length_stages(LADDER, min_entropy=1.0, on_failure=on_failure)  # type: ignore[arg-type]
        state = stages.init(DRAW)
        assert stages.ended(state) is None
        state = stages.probed(state, {"entropy": 0.5})
        assert (stages.ended(state) is not None) == ends
    # At the last length there is nothing to advance to, so nothing to fail.
    stages = length_stages((2, 4), min_entropy=1.0, on_failure="terminate")
    state = stages.probed(stages.init(DRAW), {"entropy": 2.0})
    assert stages.ended(stages.probed(state, {"entropy": 0.0})) is None


def test_lengths_must_grow() -> None:
    for lengths in ((), (0, 4), (4, 4), (4, 2)):
        with pytest.raises(UserError, match="lengths must be positive and grow"):
            length_stages(lengths)
    with pytest.raises(UserError, match="every >= 1"):
        length_stages((2, 4), every=0)


def test_the_share_rises_as_in_the_released_code() -> None:
    """The reference moves only when the share does, so a slow decline is noticed, too."""
    adaptive = adaptive_share()
    state = adaptive.init(DRAW)
    shares: list[float] = []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.15, 2.22, 1.0):
        state = adaptive.probed(state, {"loss": loss})
        shares.append(round(adaptive.numbers(state)["share"], 10))
    assert shares == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2]
    for loss in range(3, 30):
        state = adaptive.probed(state, {"loss": float(loss)})
    assert adaptive.numbers(state)["share"] == 1.0


def test_a_controller_that_overrides_nothing_does_nothing() -> None:
    bare = Controller("bare", probe=Probe({}))
    assert bare.init(DRAW) == {}
    assert bare.numbers({}) == {}
    assert bare.probed({}, {}) == {}
    assert bare.ended({}) is None
    assert str(bare.read("x")) == "bare.x"
