"""What is kept for later comes back whole, grades included, and nobody is asked for them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import group_of, make_tokenizer

from retort.align.chat import Renderer, TemplateOptions
from retort.core.rollouts import Message, Outcome, Prompt, Rollout
from retort.rollout.plan import RolloutPlan
from retort.train.source.cache import RolloutCache

PROMPT = Prompt("row", (Message("user", "1 + 1 ="),), answer="2")


@pytest.fixture
def setup() -> Any:
    """The prompts of a run, and how they are read."""
    return [PROMPT], Renderer(make_tokenizer(), TemplateOptions())


def kept(setup: Any) -> list[Rollout]:
    """Rollouts with every kind of grade: a whole one, a plain one, none."""
    rollouts = group_of(PROMPT, ["a", "b", "c"])
    context = setup[1](PROMPT)
    tokenizer = setup[1].tokenizer
    written = [
        replace(
            rollout,
            sequences=(context.then([5 + rollout.member, 7], decided=True),),
            engine_logp_A=torch.tensor([-0.25, -1.5]),
            text=tokenizer.decode([5 + rollout.member, 7]),
        )
        for rollout in rollouts
    ]
    whole = replace(written[0], reward=1 / 3, reward_parts={"far": 0.1, "steps": 2.0}, feedback="too\n\u201clong\u201d")
    return [whole, replace(written[1], reward=1.0), written[2]]


def plain(rollout: Rollout) -> dict[str, Any]:
    return {**vars(rollout), "sequences": rollout.sequence.tokens_L.tolist(), "engine_logp_A": None, "source": None}


def test_replayed_rollouts_keep_their_grades(setup: Any, tmp_path: Path) -> None:
    cache, again = RolloutCache(tmp_path), RolloutCache(tmp_path)
    cache.remember([tuple(kept(setup)), tuple(kept(setup)[:1])], 2)
    again.restore(*setup, cache.tensors(setup[0]))
    assert [[plain(r) for r in visit] for visit in again.visits] == [[plain(r) for r in v] for v in cache.visits]
    assert [len(visit) for visit in again.visits] == [3, 1]


def test_replayed_episodes_keep_what_was_replied(setup: Any, tmp_path: Path) -> None:
    """A teacher with another tokenizer reads it in its own tokens."""
    cache, again = RolloutCache(tmp_path), RolloutCache(tmp_path)
    said = Outcome((Message("tool", "2 \u0142", {"name": "add"}), Message("user", "go on")), 0.5, {"success": 1.0})
    single = kept(setup)[0]
    several = replace(
        single,
        sequences=(single.sequence.then([9]).then([6], decided=True),),
        turn_A=torch.tensor([0, 0, 1]),
        engine_logp_A=-torch.ones(3),
        member=1,
        outcomes=(said,),
    )
    cache.remember([(single, several)], 1)
    again.restore(*setup, cache.tensors(setup[0]))
    assert [rollout.outcomes for rollout in again.visits[0]] == [(), (said,)]
    cache.remember([(single,)], 1)
    assert "replay/outcomes" not in cache.tensors(setup[0])


def test_kept_answers_of_the_teacher_keep_their_grades(setup: Any, tmp_path: Path) -> None:
    cache, again = RolloutCache(tmp_path), RolloutCache(tmp_path)
    cache.keep(kept(setup), RolloutPlan(samples=3), 1)
    again.go_back(*setup, 1)
    assert {key: plain(r) for key, r in again.completions.items()} == {
        key: plain(r) for key, r in cache.completions.items()
    }
    assert len(again.completions) == 3
