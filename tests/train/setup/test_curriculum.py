"""A curriculum of turns without an environment."""

from __future__ import annotations

import pytest

from retort import config as configuration
from retort import registry
from retort.errors import UserError
from retort.train.setup.needs import need_play


def test_a_horizon_of_turns_is_noted_and_an_experts_turns_are_refused() -> None:
    alone, notes = configuration.Config(data="countdown"), list[str]()
    need_play(alone, registry.load("tcod"), notes)
    assert len(notes) == 1 and "the horizon changes nothing" in notes[0]
    with pytest.raises(UserError, match="'tcod' begins behind an expert's turns"):
        need_play(alone, registry.load("tcod", curriculum="backward"), [])
    for data in ("countdown", "rooms"):
        quiet = list[str]()
        need_play(configuration.Config(data=data), registry.load("opd"), quiet)
        assert quiet == []
    played = list[str]()
    need_play(configuration.Config(data="rooms"), registry.load("tcod", curriculum="backward"), played)
    assert played == []
