"""Forecasts of what is generated beside the student's rollouts: a debate, a judge of this process."""

from __future__ import annotations

from typing import Any

import pytest

from retort import api
from retort.preflight.rubrics import draft_checks, rubric_spending
from retort.train.setup import memory
from retort.train.setup.prepare import Prepared, prepare
from retort.train.setup.writing import writings

TINY: dict[str, Any] = {
    "precision": "fp32",
    "device": "cpu",
    "rollout": {"prompts": 4, "max_new_tokens": 10},
    "eval": {"problems": 0},
}


def number_bytes(lm: Any, tokens: int) -> int:
    """Of keys and values in fp32."""
    text = lm.model.config.get_text_config()
    return 4 * 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * text.head_dim


@pytest.fixture(scope="module")
def debating() -> Prepared:
    models = {"student": "coached:student", "teacher": "coached:teacher", "data": "coached"}
    more = {"models": {"teacher_2": {"path": "coached:student"}}}
    debate = {"rounds": 3, "tokens": 7}
    return prepare(api.assemble(TINY, models, more, {"method": {"name": "mad_opd", "samples": 2, "debate": debate}}))


def test_a_debate_of_two_teachers_and_three_rounds(debating: Prepared) -> None:
    """Each writes for each of 4 prompts, in 3 rounds; before the last they read 2 times 2 texts."""
    found = writings(debating)
    assert [(own.model, own.texts, own.at_once, own.longest) for own in found] == [
        ("teacher", 12, 4, 7),
        ("teacher_2", 12, 4, 7),
    ]
    (question,) = {own.prompt - 4 * 7 for own in found}
    assert 1 < question < 40
    (check,) = draft_checks(debating)
    assert check.saw.startswith("24 a step (debate: 12 by teacher, up to 7 tokens each; debate: 12 by teacher_2")
    assert dict(check.values) == {"texts": 24, "tokens": 24 * 7, "ratio": 24 * 7 / (4 * 2 * 10)}


def test_the_memory_of_a_debate(debating: Prepared) -> None:
    """The cache of the larger of the two is the largest there is, as it reads what all said before."""
    cache = memory.forecast(debating).cache
    longest = max(own.prompt + own.longest for own in writings(debating))
    assert cache == 4 * number_bytes(debating.lms["teacher"], longest)


def test_a_judge_of_this_process() -> None:
    """Its weights are there beside the student's, and what it answers at once takes a cache."""
    settings = {"data": "countdown", "method": {"name": "ropd", "samples": 2, "references": 3}, "judge": {}}
    found = prepare(api.assemble(TINY, settings, {"judge": {"model": "countdown:teacher"}}))
    reference, rubric, verdicts = writings(found)
    assert (reference.texts, rubric.texts, verdicts.texts) == (12, 4, 4)
    judge = reference.lm
    assert judge is not None and judge.model is not found.student.model
    forecast = memory.forecast(found)
    assert forecast.models == 4 * (found.student.parameters + judge.parameters) == forecast.loaded
    # An answer may be as long as the context allows, and 12 references are asked for at once.
    assert forecast.cache == 12 * number_bytes(judge, judge.context)
    calls = dict(rubric_spending(found)[0].values)["calls"]
    assert calls == pytest.approx(min(4 * found.steps, len(found.source.prompts)) * 3 + 4 * found.steps * 2)


def test_nothing_is_written_beside_most_methods() -> None:
    found = prepare(api.assemble(TINY, {"method": {"name": "opd"}}))
    assert writings(found) == [] and draft_checks(found) == []
