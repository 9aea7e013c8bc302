"""Rollouts that are finished visit by visit, while others are still generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from scripted import ScriptedEngine
from support import make_tokenizer

from retort.align.chat import render
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Group, Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.envs.base import Episode, Reply
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.train.source.finishing import finished

TOKENIZER = make_tokenizer(eos="<|im_end|>", chat=True)
STOP: int = TOKENIZER.eos_token_id


class LastFirst(ScriptedEngine):
    """Tells the last completion first."""

    def generate_each(
        self, requests: Sequence[Request], sampling: Sampling, told: Callable[[int, Completion], None]
    ) -> list[Completion]:
        found = self.generate(requests, sampling)
        for place in reversed(range(len(found))):
            told(place, found[place])
        return found


class Long:
    """Takes as many turns as its prompt's number says, and one more."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.left = prompt, int(prompt.id)

    def reply(self, text: str) -> Reply:
        self.left -= 1
        return Reply(over=True, reward=1.0) if self.left < 0 else Reply((Message("user", "add"),))

    def close(self) -> None:
        pass


class Game:
    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        return [Long(prompt) for _ in members]


def engine(kind: type[ScriptedEngine]) -> ScriptedEngine:
    logits_V = torch.randn(70, generator=torch.Generator().manual_seed(0))
    return kind(TOKENIZER, STOP, logits_V + torch.nn.functional.one_hot(torch.tensor(STOP), 70) * 3)


def tasks() -> list[Task]:
    prompts = [Prompt(str(number), (Message("user", "add 3 and 4"),)) for number in (2, 0, 1)]
    contexts = [TokenSequence.of(render(own, TOKENIZER)) for own in prompts]
    return [
        Task(prompt, context, member, UniformStream(0, "rollouts", prompt.id, member))
        for prompt, context in zip(prompts, contexts, strict=True)
        for member in range(2)
    ]


def ids(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [own.sequence.tokens_L.tolist() for own in rollouts]


@pytest.mark.parametrize(("kind", "order"), [(ScriptedEngine, "201"), (LastFirst, "102")], ids=["at the end", "early"])
def test_a_visit_is_finished_when_its_last_completion_is_there(kind: type[ScriptedEngine], order: str) -> None:
    seen = list[str]()

    def written(visit: list[Rollout]) -> list[Rollout]:
        assert [own.member for own in visit] == [0, 1]
        seen.append(visit[0].prompt.id)
        return visit[::-1]

    plain = run_episodes(engine(kind), tasks(), Sampling(8))
    found = run_episodes(engine(kind), tasks(), Sampling(8), on_visit=written)
    assert "".join(seen) == order
    assert ids(found) == [own for pair in zip(ids(plain)[1::2], ids(plain)[::2], strict=True) for own in pair]


@pytest.mark.parametrize("kind", [ScriptedEngine, LastFirst])
def test_episodes_of_many_turns_are_finished_between_the_turns_of_others(kind: type[ScriptedEngine]) -> None:
    seen, played = list[tuple[str, int]](), engine(kind)

    def written(visit: list[Rollout]) -> list[Rollout]:
        seen.append((visit[0].prompt.id, len(played.asked)))
        return visit

    setup = EpisodeSetup(Game())
    plain = run_episodes(engine(kind), tasks(), Sampling(40), setup=setup)
    found = run_episodes(played, tasks(), Sampling(40), setup=setup, on_visit=written)
    assert ids(found) == ids(plain)
    assert sorted(seen) == [("0", 1), ("1", 2), ("2", 3)]


def test_what_is_told_is_finished_and_the_batch_begins_once() -> None:
    rollouts = run_episodes(engine(ScriptedEngine), tasks(), Sampling(8))
    told, began = list[Group](), list[bool]()

    def play(written: Callable[[list[Rollout]], list[Rollout]] | None) -> list[Rollout]:
        parts = [rollouts[:2], rollouts[2:4], rollouts[4:]]
        return rollouts if written is None else [own for part in parts for own in written(part)]

    def finish(own: list[Rollout], begins: bool) -> list[Rollout]:
        began.append(begins)
        return own[::-1]

    assert finished(play, finish, None) == rollouts[::-1]
    assert began == [True]
    found = finished(play, finish, told.append)
    assert [own for group in told for own in group] == found != rollouts
    assert began == [True, True, False, False]
