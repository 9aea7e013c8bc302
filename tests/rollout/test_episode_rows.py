"""What a line of `rollouts.jsonl` says of an episode, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scripted import ScriptedEngine
from support import make_tokenizer

from retort.align.chat import TemplateOptions, render
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Message, Pack, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.envs.text import TextEpisodes
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.rollout.record import token_row

ASKED = Prompt("p", (Message("user", "add 3 and 4"),))


class Add:
    """Takes numbers until it hears a 7."""

    def reset(self, task: str, seed: int) -> str:
        return task

    def step(self, text: str) -> tuple[str, float, bool, Mapping[str, Any]]:
        if not text.split()[-1].isdigit():
            return "so", 0.0, False, {"tool_errors": 1}
        right = text.split()[-1] == "7"
        return "answer" if right else "add", 1.0 if right else 0.25, right, {"success": right}


def rollout(*turns: str, setup: EpisodeSetup | None = None) -> tuple[Rollout, Any]:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    stop = tokenizer.eos_token_id

    def says(request: Request) -> list[int]:
        turn = (request.context.tokens_L.tolist().count(stop) - 1) // 2
        return [*tokenizer.encode(turns[turn], add_special_tokens=False), stop, *[stop] * 40]

    engine = ScriptedEngine(tokenizer, stop, torch.zeros(len(tokenizer)), context=128, says=says)
    context = TokenSequence.of(render(ASKED, tokenizer))
    task = Task(ASKED, context, 0, UniformStream(0, "rollouts", 0, "p", 0))
    setup = setup or EpisodeSetup(TextEpisodes(Add, "add"), TemplateOptions(), None, ("success", "tool_errors"))
    return run_episodes(engine, [task], Sampling(20), setup=setup)[0], tokenizer


def test_a_row_says_the_turn_of_each_token_and_what_came_of_each_turn() -> None:
    played, tokenizer = rollout("answer", "so 3", "7")
    row = token_row(Pack.of([played]), 0, {}, tokenizer)
    assert row["turns"] == [0, 0, 1, 1, 1, 2, 2]
    assert row["outcomes"] == [
        {"messages": [["user", "so"]], "reward": 0.0, "measures": {"tool_errors": 1.0}},
        {"messages": [["user", "add"]], "reward": 0.25},
        {"messages": [["user", "answer"]], "reward": 1.0, "measures": {"success": 1.0}},
    ]
    assert row["measures"] == {"success": 1.0, "tool_errors": 1.0, "turns": 3.0}
    assert (row["status"], row["reward"]) == ("completed", 1.25)


def test_a_rollout_that_is_cut_keeps_what_came_of_the_turns_before() -> None:
    played, tokenizer = rollout("answer", "so 3", "7")
    short = played.cut(4, "answer so")
    row = token_row(Pack.of([short]), 0, {}, tokenizer)
    assert row["turns"] == [0, 0, 1, 1]
    assert [own["messages"] for own in row["outcomes"]] == [[["user", "so"]]]
    assert short.status == Status.TRUNCATED


def test_a_single_turn_has_none_of_it() -> None:
    played, tokenizer = rollout("7", setup=EpisodeSetup())
    assert not {"turns", "outcomes", "measures", "messages"} & set(token_row(Pack.of([played]), 0, {}, tokenizer))


def test_an_experts_turns_in_a_plain_prompt_are_told_apart() -> None:
    played, tokenizer = rollout("7", setup=EpisodeSetup())
    begun = (*ASKED.messages, Message("assistant", "3"), Message("user", "add"))
    moved = Rollout(Prompt("p", begun), played.sequence)
    row = token_row(Pack.of([moved]), 0, {}, tokenizer)
    assert row["messages"] == [["user", "add 3 and 4"], ["assistant", "3"], ["user", "add"]]
