"""`retort.distill`, also with a method of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import retort
from retort.advantages import log_ratio
from retort.divergences import forward_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.reduce import rollout_means, weighted
from retort.rollout import RolloutPlan
from retort.weights import above, teacher_entropy


def own_method() -> retort.Method:
    return retort.Method(
        name="mine",
        rollout=RolloutPlan(samples=2),
        terms=(
            retort.Term("reverse", score_function(log_ratio(), clip=0.1), denominator=rollout_means()),
            retort.Term(
                "forward",
                pathwise(forward_kl()),
                weight=above(teacher_entropy(), 3.0),
                denominator=weighted(),
                coef=0.5,
            ),
        ),
    )


def arguments(tiny_run: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    named = {name: tiny_run[name] for name in ("student", "teacher", "data")}
    return named, {name: value for name, value in tiny_run.items() if name not in (*named, "steps")}


def test_a_run_in_one_call(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    method = retort.load("eopd", entropy_threshold=0.6)
    run = retort.distill(**named, method=method, out=str(tmp_path / "run"), steps=2, settings=rest)
    assert run.step == 2
    assert {row["who"] for row in run.results["rows"]} == {"student before", "student after", "teacher"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"]["entropy_threshold"] == 0.6
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_method_of_ones_own_is_resumed_with_itself(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    retort.distill(**named, method=own_method(), out=str(tmp_path / "own"), steps=2, settings=rest)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (config["method"], config["own_method"]) == ({"name": "mine"}, True)
    with pytest.raises(UserError, match=r"'mine'\) is not the published one; go on with retort.distill"):
        retort.distill(resume=str(tmp_path / "own"), steps=3)
    run = retort.distill(resume=str(tmp_path / "own"), steps=3, method=own_method())
    assert run.step == 3


def test_a_weighted_denominator_does_not_depend_on_the_cut(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    losses = []
    for tokens in (1, 10**6):
        settings = {**rest, "optimizer": {**rest["optimizer"], "batch_tokens": tokens}}
        out = tmp_path / str(tokens)
        retort.distill(**named, method=own_method(), out=str(out), steps=1, settings=settings)
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_published_method_with_a_part_replaced_is_not_the_published_one(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    named, rest = arguments(tiny_run)
    eopd = retort.load("eopd")
    assert eopd.as_published
    bare = replace(eopd, terms=eopd.terms[:1])
    assert not bare.as_published
    retort.distill(**named, method=bare, out=str(tmp_path / "run"), steps=2, settings=rest)
    with pytest.raises(UserError, match="not the published one"):
        retort.distill(resume=str(tmp_path / "run"), steps=3)
