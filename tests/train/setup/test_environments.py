"""What an environment is needed for, and what does not go with one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from trained import trained

from retort import config as configuration
from retort import registry
from retort.errors import UserError
from retort.train.setup.before import need_alignment
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


def test_replies_are_not_read_in_other_tokens_and_the_run_says_so_before_it_loads_a_model() -> None:
    student, other = (SimpleNamespace(tokenizer=trained(kind)) for kind in ("gemma", "byte-level"))
    given = (registry.load("opd"), "teacher", student, other)
    need_alignment(configuration.Config(data="countdown"), *given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="replies of an environment \\('rooms'\\) cannot be read"):
        need_alignment(configuration.Config(data="rooms"), *given)  # type: ignore[arg-type]
    need_alignment(configuration.Config(data="rooms"), registry.load("opd"), "teacher", student, student)  # type: ignore[arg-type]
    by_turn = configuration.resolve({"data": "rooms", "rollout": {"history": 0}})
    need_alignment(by_turn, *given)  # type: ignore[arg-type]


def test_a_history_without_an_environment_is_said_to_change_nothing() -> None:
    notes, quiet = list[str](), list[str]()
    need_play(configuration.resolve({"data": "countdown", "rollout": {"history": 2}}), registry.load("opd"), notes)
    need_play(configuration.resolve({"data": "rooms", "rollout": {"history": 2}}), registry.load("opd"), quiet)
    assert len(notes) == 1 and "rollout.history changes nothing" in notes[0]
    assert quiet == []
