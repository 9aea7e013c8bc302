"""What a judge measures, whatever was trained by which method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch

import retort
from retort import config as configuration
from retort.core.signals import entropy
from retort.evaluate.evaluator import Evaluator
from retort.rewards.base import ByText
from retort.train.setup.prepare import prepare


@pipeline.models_once()
def test_a_table_is_about_the_models_and_not_the_losses_temperature(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    before: list[dict[str, Any]] = []
    for name in ("opd", "temperature", "gkd"):
        changed = {**settings, "steps": 1}
        retort.distill(**named, settings=changed, method=name, out=str(tmp_path / name))
        table = json.loads((tmp_path / name / "eval.json").read_text())
        before.append(next(row for row in table["rows"] if row["who"] == "student before"))
    assert before[0]["reverse_kl"]["value"] > 0
    assert before == [before[0]] * 3


def test_half_of_the_reward_is_right_for_whoever_asks(tiny_run: dict[str, Any]) -> None:
    """`docs/python.md`: from 0.5 on a completion counts as right."""
    sections = {"method": {"name": "opd"}, "eval": {"samples": 2}}
    with pipeline.models_once():
        setup = prepare(configuration.resolve(configuration.merge(tiny_run, sections)))
    for reward, share in ((0.5, 1.0), (0.49, 0.0)):
        grader = ByText(lambda prompt, text, reward=reward: reward)
        evaluator = Evaluator.from_config(setup.config, setup.held_out, grader, vocab=setup.learner.vocab)
        row = evaluator.evaluate(setup.student, setup.source.engine)
        assert row["pass_at"] == {"1": share, "2": share}
        assert row["avg@2"]["value"] == pytest.approx(reward)
        source = replace(setup.source, grader=grader)
        assert set(source.passed(setup.method.rollout, setup.source.prompts[:2], 2).values()) == {share}


def test_entropies_are_at_temperature_1_however_answers_are_drawn(tiny_run: dict[str, Any]) -> None:
    """By hand, from the model's own logits."""
    sections = {"method": {"name": "temperature"}, "eval": {"temperature": 0.6, "samples": 1}, "record": {"answers": 4}}
    with pipeline.models_once():
        setup = prepare(configuration.resolve(configuration.merge(tiny_run, sections)))
    evaluator = Evaluator.from_config(setup.config, setup.held_out, None, vocab=setup.learner.vocab)
    row = evaluator.evaluate(setup.student, setup.source.engine, teacher=setup.teachers.behind(setup.method)["teacher"])
    assert len(row["answers"]) == len(setup.held_out)
    found: list[float] = []
    for prompt, answer in zip(setup.held_out, row["answers"], strict=True):
        ids = setup.source.render(prompt).ids
        written = setup.student.tokenizer.convert_tokens_to_ids([token.strip() for token in answer["tokens"]])
        with torch.no_grad():
            logits = setup.student.model(input_ids=torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 : -1]
        own = entropy(logits[:, : setup.learner.vocab].log_softmax(-1)).tolist()
        assert answer["columns"]["student_entropy"] == pytest.approx(own, abs=1e-4)
        found += own
    assert row["student_entropy"]["value"] == pytest.approx(sum(found) / len(found), abs=1e-4)
