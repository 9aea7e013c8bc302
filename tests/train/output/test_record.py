"""Metrics of a step about groups, about what teachers were shown, and of teachers against rewards."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from retort import registry
from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Sampled
from retort.core.steps import Clock
from retort.teachers.view import View
from retort.teachers.views import peers
from retort.train.learning.diagnose import against_rewards
from retort.train.learning.passes import Batch
from retort.train.output.record import rollout_metrics, view_metrics


def written(prompt: str, member: int, reward: float | None, steps: int = 2, **more: Any) -> Rollout:
    sequence = TokenSequence.of([0]).then(range(1, steps + 1), decided=True)
    asked = Prompt(prompt, (Message("user", prompt),))
    return Rollout(asked, sequence, member=member, reward=reward, **more)


def metrics(*rollouts: Rollout) -> dict[str, float]:
    return rollout_metrics(cast(Any, SimpleNamespace(pack=Pack.of(rollouts))), version=0)


def test_groups_with_a_success_and_with_both_kinds() -> None:
    found = metrics(
        *(written("a", member, reward) for member, reward in enumerate((1.0, 0.0, 0.0))),
        *(written("b", member, 0.4) for member in range(2)),
        *(written("c", member, 1.0) for member in range(2)),
        written("alone", 0, 1.0),
    )
    assert found["success_group_fraction"] == pytest.approx(2 / 3)
    assert found["mixed_group_fraction"] == pytest.approx(1 / 3)


def test_no_group_metrics_without_groups_or_rewards() -> None:
    for rollouts in ((written("a", 0, 1.0), written("b", 0, 1.0)), (written("a", 0, None), written("a", 1, None))):
        assert not {"success_group_fraction", "mixed_group_fraction"} & metrics(*rollouts).keys()


def test_shares_of_what_was_shown() -> None:
    counts = {"no_context": 1.0, "cut": 2.0, "prompt_tokens": 30.0, "shows/success": 3.0, "shows/failure": 1.0}
    signal = Sampled(torch.zeros(2, dtype=torch.long), "teacher", torch.zeros(2), counts=counts)
    assert view_metrics({"teacher": signal}, {"teacher": peers()}, rollouts=4) == {
        "view/teacher/no_context": 0.25,
        "view/teacher/cut": 0.5,
        "view/teacher/shows/success": 0.75,
        "view/teacher/shows/failure": 0.25,
        "view/teacher/prompt_tokens": 10.0,
    }
    bare = replace(signal, counts={"cut": 1})
    assert view_metrics({"teacher": bare}, {"teacher": peers()}, rollouts=4) == {"view/teacher/cut": 0.25}
    assert not view_metrics({"teacher": signal}, {"teacher": View.same_prompt()}, rollouts=4)


def test_a_teacher_against_rewards_within_prompts() -> None:
    # Between prompts the teacher is misled, within them it is right.
    pack = Pack.of([written("a", 0, 1.0), written("a", 1, 0.0), written("b", 0, 1.0), written("b", 1, 0.0)])
    teacher = torch.tensor([-1.0, -1.0, -2.0, -2.0, -5.0, -5.0, -6.0, -6.0])
    values = {"teacher_logp": teacher, "student_logp": torch.zeros(8)}
    found = against_rewards(pack, values)
    assert found["teacher_signal/auc"] == 1.0
    assert found["trajectory_auroc"] == pytest.approx(3 / 4)
    assert {name for name in found if "/" in name} == {
        f"teacher_signal/{name}"
        for name in ("auc", "brier", "kendall", "pairwise_accuracy", "point_biserial", "spearman")
    }


def test_rollouts_without_context_say_nothing_of_the_teacher() -> None:
    pack = Pack.of([written("a", member, float(member < 2)) for member in range(4)])
    teacher = torch.tensor([-1.0, -1.0, 9.0, 9.0, -3.0, -3.0, 99.0, 99.0])  # what is not valid is of zeros
    valid = torch.tensor([True, True, False, False, True, True, False, False])
    values = {"teacher_logp": teacher, "student_logp": torch.zeros(8)}
    assert against_rewards(pack, values, valid)["trajectory_auroc"] == 1.0
    assert against_rewards(pack, values)["trajectory_auroc"] < 1.0
    assert against_rewards(pack, values, torch.zeros(8, dtype=torch.bool)) == {}


def test_nothing_of_ungraded_or_foreign_answers() -> None:
    values = {"teacher_logp": torch.zeros(4), "student_logp": torch.zeros(4)}
    ungraded = Pack.of([written("a", 0, None), written("a", 1, None)])
    foreign = Pack.of([written("a", 0, 1.0, source="teacher"), written("a", 1, 0.0, source="dataset")])
    for pack in (ungraded, foreign):
        assert against_rewards(pack, values) == {}
    assert against_rewards(Pack.of([written("a", 0, 1.0), written("a", 1, math.nan)]), {}) == {}


def test_what_a_view_is_about_is_fetched_once() -> None:
    """A teacher's mask may lie on a GPU: asked for per micro-batch, each would wait for all work before it."""
    pack = Pack.of([written("a", 0, 1.0)])
    signal = Sampled(pack.steps.tokens_N, "teacher", torch.zeros(2), valid_N=torch.tensor([True, False]))
    batch = Batch(registry.load("opd"), pack, pack.steps, {"teacher": signal}, Clock())
    assert batch.valid is batch.valid
    assert batch.valid["teacher"] is not None
    again = replace(batch, signals={"teacher": replace(signal, valid_N=None)})
    assert again.valid == {"teacher": None}
