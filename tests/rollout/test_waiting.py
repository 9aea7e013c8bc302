"""Waiting for environments: deadlines, their record, and replies that others do not wait for. Events, no clocks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from scripted import ScriptedEngine
from support import make_tokenizer

from retort.align.chat import render
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Message, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.envs.base import Episode, Reply
from retort.envs.behind import BehindExpert
from retort.errors import UserError
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.rollout.timeouts import Timeouts
from retort.rollout.waiting import MOST_CALLS, Waiting

ASKED = Prompt("p", (Message("user", "add 3 and 4"),))
#: Long enough for a reply that is there, also on a machine that is busy; and for one that never comes.
LONG, SHORT = 600.0, 0.2


@dataclass(eq=False)
class Game:
    """Ends after so many turns; before some replies it waits for an event."""

    prompt: Prompt
    turns: int
    before: dict[int, threading.Event]
    ended: Callable[[], None] = bool  # type: ignore[assignment]
    heard: int = 0
    closed: int = 0
    shut: threading.Event = field(default_factory=threading.Event)

    def reply(self, text: str) -> Reply:
        self.heard += 1
        if self.heard in self.before:
            self.before[self.heard].wait()
        if self.heard == self.turns:
            self.ended()
            return Reply(over=True, reward=float(len(text)))
        return Reply((Message("user", "add"),), reward=0.25)

    def close(self) -> None:
        self.closed += 1
        self.shut.set()


class Games:
    """An environment of such games, one for each member."""

    def __init__(self, turns: Sequence[int], before: dict[int, dict[int, threading.Event]] | None = None) -> None:
        self.turns, self.before = turns, before or {}
        self.games: list[Game] = []
        self.ended: Callable[[int], object] = bool

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        self.games = [
            Game(prompt, self.turns[member], self.before.get(member, {}), partial(self.ended, member))
            for member in members
        ]
        return self.games


class Drawing(ScriptedEngine):
    """Draws two tokens and ends; what it draws follows from the request alone."""

    def __init__(self) -> None:
        tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
        super().__init__(tokenizer, tokenizer.eos_token_id, torch.zeros(len(tokenizer)), context=256)

    def _one(self, request: Request, sampling: Sampling) -> Any:
        first = 5 + int(request.uniforms[0] * 20)
        self.says = lambda _: [first, 5 + int(request.uniforms[1] * 20), *[self.stop] * 200]
        return super()._one(request, sampling)


def played(
    games: Any, engine: Any = None, waiting: Waiting | None = None, members: int = 3, most: int = 200
) -> list[Rollout]:
    engine = engine or Drawing()
    context = TokenSequence.of(render(ASKED, engine.tokenizer))
    tasks = [Task(ASKED, context, member, UniformStream(0, "rollouts", 0, "p", member)) for member in range(members)]
    return run_episodes(engine, tasks, Sampling(most), setup=EpisodeSetup(games, waiting=waiting or Waiting()))


def plain(rollouts: Sequence[Rollout]) -> list[Any]:
    return [
        (r.action_ids, r.text, r.status, r.reward, r.measures, r.turn_A.tolist() if r.turn_A is not None else None)
        for r in rollouts
    ]


# --- ready ---


def test_fast_episodes_end_before_a_slow_reply_comes_and_the_rollouts_are_those_of_lockstep() -> None:
    released = threading.Event()
    games, over = Games([4, 3, 4], {0: {1: released}}), set[int]()

    def ended(member: int) -> None:
        over.add(member)
        if over == {1, 2}:
            released.set()  # the slow reply comes when both others are over, and would never come otherwise

    games.ended = ended
    engine = Drawing()
    ready = played(games, engine, Waiting(turns="ready"))
    slow = UniformStream(0, "rollouts", 0, "p", 0)
    assert len(engine.asked[0]) == 3
    for turn, asked in enumerate(engine.asked[-3:], 1):
        assert [request.uniforms[0] for request in asked] == [slow.uniforms(turn, count=1)[0]]
    lockstep = Drawing()
    assert plain(played(Games([4, 3, 4]), lockstep)) == plain(ready)
    assert len(lockstep.asked) == 4 < len(engine.asked)
    assert [own.closed for own in games.games] == [1, 1, 1]


def test_more_episodes_than_are_asked_at_once_all_end() -> None:
    count = MOST_CALLS + 9
    rollouts = played(Games([2] * count), waiting=Waiting(turns="ready"), members=count)
    assert plain(rollouts) == plain(played(Games([2] * count), members=count))


@pytest.mark.parametrize(
    "waiting", [Waiting(turns="ready"), Waiting(LONG), Waiting(LONG, "ready")], ids=["ready", "deadline", "both"]
)
def test_whoever_waits_in_threads_gets_the_same_rollouts_and_errors(waiting: Waiting) -> None:
    assert plain(played(Games([4, 3, 4]), waiting=waiting)) == plain(played(Games([4, 3, 4])))

    class Odd(Games):
        def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
            begun = super().begin_group(prompt, members)
            self.games[1].reply = lambda text: (_ for _ in ()).throw(UserError("no reply"))  # type: ignore[method-assign]
            return begun

    odd = Odd([2, 2, 2])
    with pytest.raises(UserError, match="no reply"):
        played(odd, waiting=waiting)
    assert [own.closed for own in odd.games] == [1, 1, 1]


# --- deadlines ---


def hanging(record: Timeouts, *, turn: int = 2, turns: str = "lockstep") -> tuple[list[Rollout], Games]:
    """Episodes of which the second one hangs in a turn."""
    never = threading.Event()
    games = Games([4, 4, 4], {1: {turn: never}})
    rollouts = played(games, waiting=Waiting(SHORT, turns, record))  # type: ignore[arg-type]
    assert games.games[1].closed == 0, "closed while it was at work"
    never.set()
    return rollouts, games


@pytest.mark.parametrize("turns", ["lockstep", "ready"])
def test_a_reply_that_does_not_come_in_time_ends_its_episode_and_no_other(turns: str) -> None:
    rows: list[Any] = []
    record = Timeouts(keep=rows.append)
    rollouts, games = hanging(record, turns=turns)
    whole = played(Games([4, 4, 4]))
    assert plain([rollouts[0], rollouts[2]]) == plain([whole[0], whole[2]])
    late = rollouts[1]
    assert late.status == Status.TRUNCATED
    assert late.feedback == "the environment did not reply to turn 2 within 0.2 seconds (rollout.deadline)"
    assert late.measures == {"timed_out": 1.0, "turns": 2.0}
    assert (late.reward, late.action_ids) == (0.25, whole[1].action_ids[:6])
    (row,) = rows
    assert (row["turn"], row["episode"], row["words"]) == (2, '["rollouts", 0, "p", 1]', late.feedback)
    assert games.games[1].shut.wait(LONG), "an episode that came back was not closed"


def test_what_was_late_once_ends_again_at_the_same_turn_without_being_asked() -> None:
    rows: list[Any] = []
    first, _ = hanging(Timeouts(keep=rows.append))
    again, games = Timeouts(), Games([4, 4, 4])
    again.open(rows, rows.append, lambda: 0)
    assert plain(played(games, waiting=Waiting(LONG, timeouts=again))) == plain(first)
    assert [game.heard for game in games.games] == [4, 1, 4]
    assert len(rows) == 1


def test_a_record_says_nothing_of_another_step_or_of_another_course() -> None:
    rows: list[Any] = []
    hanging(Timeouts(keep=rows.append))
    whole = plain(played(Games([4, 4, 4])))
    for step, changed in ((1, {}), (0, {"tokens": "0" * 16}), (0, {"turn": 3}), (0, {"episode": '["rollouts"]'})):
        other = Timeouts()
        other.open([{**row, **changed} for row in rows], rows.append, lambda step=step: step)
        found = played(Games([4, 4, 4]), waiting=Waiting(timeouts=other))
        assert plain(found) == whole


@pytest.mark.parametrize("behind", [False, True])
def test_an_environment_that_does_not_begin_in_time_is_an_error_and_recorded(behind: bool) -> None:
    never, rows = threading.Event(), list[Any]()

    class Stuck(Games):
        def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
            never.wait()
            return super().begin_group(prompt, members)

    stuck: Any = Stuck([2, 2, 2])
    games = BehindExpert(stuck, 1) if behind else stuck
    rollouts = played(games, waiting=Waiting(SHORT, timeouts=Timeouts(keep=rows.append)))
    for rollout in rollouts:
        assert (rollout.status, rollout.measures["timed_out"]) == (Status.ERROR, 1.0)
        assert rollout.feedback == "the environment did not begin the episode within 0.2 seconds (rollout.deadline)"
    assert [row["turn"] for row in rows] == [0]
    never.set()
    again = Timeouts()
    again.open(rows, rows.append, lambda: 0)
    never_asked = Games([2, 2, 2])
    assert plain(played(never_asked, waiting=Waiting(LONG, timeouts=again))) == plain(rollouts)
    assert never_asked.games == []


def test_a_close_that_hangs_is_left_behind() -> None:
    never, games = threading.Event(), Games([1, 1, 1])
    begun = games.begin_group

    def stuck(prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        episodes = begun(prompt, members)
        games.games[1].close = lambda: never.wait() and None  # type: ignore[method-assign]
        return episodes

    games.begin_group = stuck  # type: ignore[method-assign]
    rollouts = played(games, waiting=Waiting(SHORT))
    assert [rollout.status for rollout in rollouts] == [Status.COMPLETED] * 3
    assert [games.games[0].closed, games.games[2].closed] == [1, 1]
    never.set()


EXITS = """
import threading, torch
from retort.rollout.waiting import Calls
calls = Calls(0.2)
calls.ask(1, threading.Event().wait)
assert calls.arrived() == [(1, None)]
print("done", flush=True)
"""


def test_a_process_ends_beside_a_thread_that_hangs() -> None:
    """The check is that this test ends at all: subprocess raises where the process does not."""
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
