"""ReOPD: which turn is drawn, what the student reads before it, and a run on the game."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

import retort
from retort.core.rollouts import Message, Prompt
from retort.envs.behind import AtDrawnTurn
from retort.envs.registry import load
from retort.errors import UserError
from retort.rollout.episodes import EpisodeSetup
from retort.rollout.plan import TurnCurriculum, plan_summary

ROW = Prompt("rooms-three-3", (Message("user", "three 3"),))


def test_turns_are_drawn_with_odds_of_a_power_each() -> None:
    env, draws = AtDrawnTurn(load("rooms"), 0.6, 1, 0), 4000
    found = Counter(env.turn(4, ROW, member) for member in range(draws))
    total = sum(0.6**turn for turn in range(4))
    assert set(found) == {0, 1, 2, 3}
    for turn in range(4):
        share = 0.6**turn / total
        assert abs(found[turn] / draws - share) < 3.3 * math.sqrt(share * (1 - share) / draws)


def test_draws_are_of_seed_batch_prompt_and_member() -> None:
    def drawn(seed: int, done: int) -> list[int]:
        return [AtDrawnTurn(load("rooms"), 1.0, seed, done).turn(50, ROW, member) for member in range(8)]

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(0, 4) != drawn(1, 4)
    assert len(set(drawn(0, 3))) > 1
    assert AtDrawnTurn(load("rooms"), 0.6, 0, 0).turn(0, ROW, 0) == 0


def test_the_student_reads_the_experts_turns_and_plays_one() -> None:
    setup = EpisodeSetup(load("rooms"), turns=16).within(TurnCurriculum("drawn", decay=1.0), 5, 2)
    assert setup.turns == 1
    assert isinstance(setup.environment, AtDrawnTurn)
    members = [0, 1, 2, 3, 4, 5]
    way = list(load("rooms").begin_group(ROW, [0])[0].expert())  # type: ignore[attr-defined]
    episodes = setup.environment.begin_group(ROW, members)
    for member, episode in zip(members, episodes, strict=True):
        done = [message.content for message in episode.prompt.messages if message.role == "assistant"]
        assert done == way[: setup.environment.turn(len(way), ROW, member)]
    assert len({len(episode.prompt.messages) for episode in episodes}) > 1


def test_a_completion_without_an_environment_is_the_one_turn_that_there_is() -> None:
    setup = EpisodeSetup()
    assert setup.within(TurnCurriculum("drawn"), 0) is setup


def test_a_run_on_the_game_has_one_turn_an_episode(tmp_path: Path) -> None:
    sections = {
        "steps": 1,
        "precision": "fp32",
        "rollout": {"prompts": 4, "max_new_tokens": 8, "max_prompt_tokens": 96},
        "eval": {"problems": 0},
        "checks": "skip",
    }
    retort.distill(
        student="rooms:student",
        teacher="rooms:teacher",
        data="rooms",
        settings=sections,
        method={"name": "reopd", "samples": 2},
        out=str(tmp_path / "run"),
    )
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["turns"] == 1.0
    assert math.isfinite(line["loss"])


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_odds_that_mean_nothing_are_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"decay must lie in \(0, 1\]"):
        retort.load("reopd", decay=decay)


def test_the_plan_says_so() -> None:
    assert "one turn of each episode, after an expert's" in plan_summary(retort.load("reopd").rollout, 8)
