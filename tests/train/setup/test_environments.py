"""What an environment is needed for, and what does not go with one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from trained import trained

from retort import config as configuration
from retort import registry
from retort.errors import UserError
from retort.train.events.advice import advice
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


def test_waiting_for_no_environment_is_noted() -> None:
    for waiting in ({"deadline": 3}, {"turns": "ready"}):
        for data, count in (("countdown", 1), ("rooms", 0)):
            config, notes = configuration.resolve({"data": data, "rollout": waiting}), list[str]()
            need_play(config, registry.load("opd"), notes)
            assert len(notes) == count


def test_late_replies_are_said_once() -> None:
    already = set[str]()
    (said,) = advice({"timed_out": 0.25}, (), 3, already)
    assert said.startswith("step 3: rollout.deadline ended 25.0% of the episodes")
    assert advice({"timed_out": 0.5}, (), 4, already) == advice({"timed_out": 0.0}, (), 5, set()) == []


def test_replies_are_not_read_in_other_tokens_and_the_run_says_so_before_it_loads_a_model() -> None:
    student, other = (SimpleNamespace(tokenizer=trained(kind)) for kind in ("gemma", "byte-level"))
    given = (registry.load("opd"), "teacher", student, other)
    need_alignment(configuration.Config(data="countdown"), *given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="replies of an environment \\('rooms'\\) cannot be read"):
        need_alignment(configuration.Config(data="rooms"), *given)  # type: ignore[arg-type]
    need_alignment(configuration.Config(data="rooms"), registry.load("opd"), "teacher", student, student)  # type: ignore[arg-type]
