"""Whole runs in which texts are written before a teacher scores: on record, and the same when a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
import safetensors.torch
import torch

from retort import config as configuration
from retort import registry
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")


def started(settings: dict[str, Any], folder: Path, method: dict[str, Any], **more: Any) -> Path:
    bare = pipeline.for_method(settings, registry.load(**method))
    own = {
        "method": method,
        "steps": 2,
        "checks": "skip",
        "rollout": {"prompts": 3},
        "eval": {"problems": 0},
        "checkpoint": {"every": 1, "keep": 2},
        "record": {"rollouts": 99, "overlap": 0},
    }
    runner.start(configuration.resolve(configuration.merge(bare, configuration.merge(own, more))), folder).go()
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def goes_on_alike(folder: Path, copy: Path) -> None:
    """Goes on from the first checkpoint in a copy, and compares what is said and what is learnt."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    runner.resume(copy / "checkpoints" / "step-1").go()
    wanted, found = weights(folder), weights(copy)
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert [row["passages"] for row in rows(copy)] == [row["passages"] for row in rows(folder)]


def test_a_rationale_is_on_record_and_a_resumed_run_writes_it_again(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "opsd", "reason_first": True, "weights": "live"}
    whole = started(tiny_run, tmp_path / "whole", method)
    found = rows(whole)
    assert {row["step"] for row in found} == {1, 2}
    for row in found:
        (own,) = row["passages"]
        assert (own["of"], own["model"]) == ("rationale", "student")
    assert len({row["passages"][0]["text"] for row in found}) > 1
    goes_on_alike(whole, tmp_path / "again")


def test_sentences_about_siblings_are_on_record_and_a_resumed_run_writes_them_again(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": "peer_opd", "summaries": 1, "summary": "written", "summary_tokens": 3, "samples": 3}
    whole = started(tiny_run, tmp_path / "whole", method)
    found = rows(whole)
    for row in found:
        (own,) = row["passages"]
        assert (own["of"], own["model"]) == ("summary", "student")
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["view/teacher/shows/summary"] > 0
    goes_on_alike(whole, tmp_path / "again")


def test_instructions_are_written_for_each_context(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    shown = {"level": "token", "contexts": 2, "context": "induced", "instruction_tokens": 4, "gamma": 1.0}
    method = {"name": "unisd", "preset": "star", "agreement": shown, "contrastive": {"coef": 0.0}}
    whole = started(tiny_run, tmp_path / "whole", method)
    found = rows(whole)
    for row in found:
        assert [(own["of"], own["model"]) for own in row["passages"]] == [("instruction", "student")] * 2
    assert any(len({own["text"] for own in row["passages"]}) == 2 for row in found)
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["view/context_1/shows/instruction"] > 0
    assert any(row["agreement"] < 1 for row in metrics), "the contexts are apart"
    goes_on_alike(whole, tmp_path / "again")


def test_teachers_debate_the_steps_of_given_histories(
    model_folder: Callable[..., Path], tmp_path: Path, tiny_run: dict[str, Any]
) -> None:
    names = ("user", "assistant", "tool", "assistant", "user")
    talks = [[{"role": name, "content": f"{row} + {turn}"} for turn, name in enumerate(names)] for row in range(4)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    given = {
        **{name: value for name, value in tiny_run.items() if name != "task"},
        "student": str(model_folder(seed=1, chat=True)),
        "teacher": str(model_folder(seed=2, chat=True)),
        "data": str(tmp_path / "talks.jsonl"),
        "data_turns": "each",
    }
    method = {"name": "opad", "rounds": 1, "debate_tokens": 4, "repetition_limit": 1.0}
    longer = {"rollout": {"prompts": 12, "max_prompt_tokens": 64}, "steps": 1}
    found = rows(started(given, tmp_path / "run", method, **longer))
    assert sorted(row["prompt_id"] for row in found) == [f"{row}:{step}" for row in range(4) for step in (1, 2, 3)]
    for row in found:
        assert [own["model"] for own in row["passages"]] == ["teacher", "teacher_2"]
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss"] > 0
    assert metrics["view/teacher/no_context"] == 0
