"""A horizon of turns: the first turns of an episode, or its last ones behind an expert's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from retort.core.rollouts import Message, Prompt, Status
from retort.envs.base import Episode, SingleTurn
from retort.envs.behind import BehindExpert
from retort.envs.registry import load
from retort.envs.text import TextEpisodes
from retort.errors import UserError
from retort.rollout.episodes import EpisodeSetup
from retort.rollout.plan import TurnCurriculum

ROW = Prompt("rooms-three-3", (Message("user", "three 3"),))


def way() -> list[str]:
    return list(episode().expert())  # type: ignore[attr-defined]


def episode(turns: int | None = None) -> Episode:
    rooms = load("rooms")
    return (rooms if turns is None else BehindExpert(rooms, turns)).begin_group(ROW, [0])[0]


@pytest.mark.parametrize("left", [1, 2, 4, 99])
def test_an_expert_leaves_its_last_turns(left: int) -> None:
    """The student reads the very conversation that the expert had, and the expert's rest leads to success."""
    whole, begun = way(), episode(left)
    done = whole[: max(0, len(whole) - left)]
    assert [message.content for message in begun.prompt.messages if message.role == "assistant"] == done
    plain = episode()
    expected = list(plain.prompt.messages)
    for text in done:
        expected += [Message("assistant", text), *plain.reply(text).messages]
    assert list(begun.prompt.messages) == expected and begun.prompt.id == ROW.id
    replies = [begun.reply(text) for text in whole[len(done) :]]
    assert [reply.over for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1].measures["success"] == 1


def test_the_expert_is_the_same_for_all_members_of_a_group() -> None:
    episodes = BehindExpert(load("rooms"), 2).begin_group(ROW, [0, 1, 2])
    first, *others = [own.prompt for own in episodes]
    assert others == [first, first]


class Door:
    """An episode that a knock ends."""

    max_turns = 4
    closed = 0

    def reset(self, task: str, seed: int) -> str:
        return "a door"

    def step(self, text: str) -> tuple[str, float, bool, dict[str, float]]:
        return "open", 1.0, text == "knock", {"success": 1.0}

    def close(self) -> None:
        type(self).closed += 1


class Knocking(Door):
    """Its expert goes on after the end."""

    def expert(self) -> list[str]:
        return ["knock", "knock", "enter"]


class Unsure(Door):
    def expert(self) -> list[str] | None:
        return None


def begun(make: type[Door], turns: int = 1) -> Sequence[Episode]:
    return BehindExpert(TextEpisodes(make, make.__name__), turns).begin_group(ROW, [0])


def test_an_experts_way_that_does_not_replay_fails_that_episode() -> None:
    Door.closed = Knocking.closed = 0
    reply = begun(Knocking)[0].reply("anything")
    assert reply.over and reply.status == Status.ERROR
    assert "the expert's way of 3 turns was over after turn 1" in reply.feedback
    assert Knocking.closed == 1


def test_where_no_expert_is_known_the_episode_begins_at_its_beginning() -> None:
    assert [message.content for message in begun(Unsure)[0].prompt.messages] == ["a door"]


def test_an_environment_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match="Door has no method `expert`"):
        begun(Door)
    with pytest.raises(UserError, match="knows no expert"):
        BehindExpert(SingleTurn(), 1).begin_group(ROW, [0])


@pytest.mark.parametrize(("most", "horizons"), [(None, [1, 1, 2, 2, 3]), (2, [1, 1, 2, 2, 2])])
def test_forward_the_horizon_is_the_most_turns(most: int | None, horizons: list[int]) -> None:
    setup = EpisodeSetup(turns=most)
    assert [setup.within(TurnCurriculum("forward"), done).turns for done in range(5)] == horizons
    assert setup.within(None, 3) is setup


def test_backward_the_student_plays_to_the_end() -> None:
    setup = EpisodeSetup(load("rooms"), turns=7).within(TurnCurriculum("backward", start=2, every=3), 6)
    assert isinstance(setup.environment, BehindExpert) and setup.environment.turns == 4 and setup.turns == 7
