"""What an environment is needed for, and what does not go with one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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


#: One that only adds to a conversation, and one that shows the user's first turn alone.
ADDS = "{% for one in messages %}{{ one.content }}{% if one.role == 'assistant' %}<end>{% endif %}{% endfor %}"
FIRST = ADDS.replace("{{ one.content }}", "{% if one.role == 'assistant' or loop.first %}{{ one.content }}{% endif %}")


@pytest.mark.parametrize(
    ("template", "refused"), [(ADDS, None), (None, "no conversations"), (FIRST, "leaves out turns")]
)
def test_replies_are_read_in_other_tokens_or_the_run_says_why_not_before_it_loads_a_model(
    monkeypatch: pytest.MonkeyPatch, template: str | None, refused: str | None
) -> None:
    student, other = (SimpleNamespace(tokenizer=trained(kind)) for kind in ("gemma", "byte-level"))
    monkeypatch.setattr(other.tokenizer, "chat_template", template)
    given: Any = (registry.load("opd"), "teacher", student, other)
    need_alignment(configuration.Config(data="countdown"), *given)
    if refused is None:
        need_alignment(configuration.Config(data="rooms"), *given)
        return
    with pytest.raises(
        UserError, match=f"replies of an environment \\('rooms'\\) cannot be read: .*{refused}"
    ) as error:
        need_alignment(configuration.Config(data="rooms"), *given)
    assert "\n" not in str(error.value)


def test_methods_that_compare_ids_are_refused_in_an_environment_too() -> None:
    student, other = (SimpleNamespace(tokenizer=trained(kind)) for kind in ("gemma", "byte-level"))
    given: Any = ("teacher", student)
    with pytest.raises(UserError, match="method 'gkd' needs"):
        need_alignment(configuration.Config(data="rooms"), registry.load("gkd"), *given, other)
    need_alignment(configuration.Config(data="rooms"), registry.load("gkd"), *given, student)


def test_a_history_without_an_environment_is_said_to_change_nothing() -> None:
    notes, quiet = list[str](), list[str]()
    need_play(configuration.resolve({"data": "countdown", "rollout": {"history": 2}}), registry.load("opd"), notes)
    need_play(configuration.resolve({"data": "rooms", "rollout": {"history": 2}}), registry.load("opd"), quiet)
    assert len(notes) == 1 and "rollout.history changes nothing" in notes[0]
    assert quiet == []
