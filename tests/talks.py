"""An environment with a fixed text, and episodes in which given turns are written there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scripted import ScriptedEngine
from support import make_tokenizer

from retort.align.chat import TemplateOptions, render
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.envs.base import Episode, Reply
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes

READING = TemplateOptions(date="2026-11-29")
ASKED = Prompt("p", (Message("user", "add 3"),))
#: What the environment replies to each turn; its last word ends the episode.
REPLIES = ("from 4", "so 5", "and 6")
TURNS = ("3", "so 9", "the answer", "7")


class Talks:
    """An environment with a fixed text."""

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        return [Talk(prompt) for _ in members]


class Talk:
    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.heard = prompt, list[str]()

    def reply(self, text: str) -> Reply:
        self.heard.append(text)
        count = len(self.heard)
        return Reply((Message("user", REPLIES[count - 1]),)) if count <= len(REPLIES) else Reply(over=True, reward=1.0)

    def close(self) -> None:
        pass


def words() -> Any:
    return make_tokenizer(eos="<|im_end|>", chat=True)


def played(
    tokenizer: Any, turns: Sequence[str] = TURNS, *, prompt: Prompt = ASKED, context: int = 2000, **setup: Any
) -> Rollout:
    """The episode in which these turns are written."""
    stop, said = tokenizer.eos_token_id, iter(turns)

    def says(request: Request) -> list[int]:
        return [*tokenizer.encode(next(said), add_special_tokens=False), stop]

    engine = ScriptedEngine(tokenizer, stop, torch.zeros(len(tokenizer)), context=context, says=says)
    begun = TokenSequence.of(render(prompt, tokenizer, READING))
    task = Task(prompt, begun, 0, UniformStream(0, "rollouts", 0, "p", 0))
    (rollout,) = run_episodes(engine, [task], Sampling(200), setup=EpisodeSetup(Talks(), READING, **setup))
    asked = [request.context for (request,) in engine.asked]
    written = [own.before(step) for own in rollout.sequences for step in first_steps(own)]
    assert [own.tokens_L.tolist() for own in asked] == [own.tokens_L.tolist() for own in written], "read as written"
    return rollout


def first_steps(sequence: TokenSequence) -> list[int]:
    """The first decision of every turn of a sequence."""
    found, step = list[int](), 0
    for piece in sequence.pieces():
        found += [step] if piece.steps else []
        step += piece.steps
    return found


def said(turns: Sequence[str], first: int, last: int) -> tuple[Message, ...]:
    """The exchanges from one number to before another."""
    pairs = zip(turns[first:last], REPLIES[first:last], strict=True)
    return tuple(own for turn, reply in pairs for own in (Message("assistant", turn), Message("user", reply)))
