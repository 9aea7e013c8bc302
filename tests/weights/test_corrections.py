"""Corrections for a rollout engine that is not the trainer, by hand; and in a run, where the two agree."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from torch import Tensor

import retort
from retort.core.rollouts import in_groups
from retort.errors import UserError
from retort.functional import token_losses
from retort.models.lm import LanguageModel
from retort.registry import load
from retort.train.storage.metrics import Stopwatch
from retort.weights.corrections import corrected, effective_sample_size

KINDS = ("token", "token_mask", "sequence", "sequence_mask", "geometric")
RATIOS = torch.tensor([0.4, 1.0, 6.0, 1.0005, 0.9995, 1.0], dtype=torch.float64)
ROLLOUTS = torch.tensor([0, 0, 0, 1, 1, 1])


def batch(gap: Tensor | None) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(0, 9, (6,), generator=draw)
    logp = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    return {
        "student_logits": logits.requires_grad_(),
        "teacher_logits": teacher,
        "tokens": tokens,
        "rollouts": ROLLOUTS,
        "engine_logp": None if gap is None else logp.detach() - gap,
    }


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("token", [0.4, 1.0, 2.0, 1.0005, 0.9995, 1.0]),
        ("token_mask", [0.0, 1.0, 0.0, 1.0005, 0.9995, 1.0]),
        ("sequence", [2.0, 2.0, 2.0, *[1.0005 * 0.9995] * 3]),
        ("sequence_mask", [0.0, 0.0, 0.0, *[1.0005 * 0.9995] * 3]),
        ("geometric", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    ],
)
def test_each_correction_by_hand(kind: Any, wanted: list[float]) -> None:
    losses = token_losses(load("opd", correction=kind), **batch(RATIOS.log()))
    torch.testing.assert_close(losses.terms["reverse"].weight, torch.tensor(wanted, dtype=torch.float64))
    assert not losses.terms["reverse"].weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_agrees_or_says_nothing_changes_nothing(kind: Any) -> None:
    plain = token_losses("opd", **batch(None)).loss
    for gap in (torch.zeros(6, dtype=torch.float64), torch.full((6,), math.nan, dtype=torch.float64), None):
        given = batch(gap)
        found = token_losses(load("opd", correction=kind), **given)
        torch.testing.assert_close(found.loss, plain, rtol=1e-14, atol=0)


def test_without_a_bound_it_is_unbiased() -> None:
    """The engine's expectation of xi * f is the trainer's of f."""
    draw = torch.Generator().manual_seed(3)
    engine, trainer = (torch.randn(7, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    value = torch.randn(7, generator=draw, dtype=torch.float64)
    weight = corrected(trainer - engine, torch.arange(7), "token", 0.0, math.inf)
    assert (engine.exp() * weight).sum().item() == pytest.approx(1.0)
    assert (engine.exp() * weight * value).sum().item() == pytest.approx((trainer.exp() * value).sum().item())


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.ones(5)) == 1.0
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_sample_size(torch.zeros(3)) == 0.0


def test_a_mean_of_one_and_bounds() -> None:
    from retort.advantages import log_ratio
    from retort.estimators import score_function
    from retort.method import Method, Term
    from retort.rollout.plan import RolloutPlan
    from retort.weights import engine_correction

    term = Term("reverse", score_function(log_ratio()), weight=engine_correction("token", mean_one=True))
    losses = token_losses(Method(RolloutPlan(), (term,)), **batch(RATIOS.log()))
    assert losses.terms["reverse"].weight.mean().item() == pytest.approx(1.0)
    with pytest.raises(UserError, match="must lie below high"):
        load("opd", correction="geometric", correction_high=0.5)
    with pytest.raises(UserError, match="name one in method.correction"):
        load("opd", correction_high=3.0)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_run_logs_weights_and_sample_size(tiny_run: dict[str, Any], tmp_path: Path, kind: str) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    method = {"name": "opd", "correction": kind}
    retort.distill(**named, settings={**settings, "steps": 2}, method=method, out=str(tmp_path / "run"))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["importance"] == pytest.approx(1.0, abs=1e-3), "this engine is the trainer's own model"
        assert row["ess"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "wanted", "passes"), [(None, None, 1), ("token", 2.0, 1), ("token_mask", 5.0, 1), ("sequence", 2.0, 2)]
)
def test_the_sample_size_of_another_engine_and_what_it_costs(
    tiny_run: dict[str, Any], kind: Any, wanted: float | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what looks at a whole rollout passes over the batch before; the sample size is that of the weights."""
    setup = pipeline.cut_to(pipeline.prepared(tiny_run, "opd", correction=kind), 10**6)
    once = setup.config.optimizer.model_copy(update={"epochs": 1})
    learner = dataclasses.replace(setup.learner, settings=once)
    setup = dataclasses.replace(setup, learner=learner)
    pack, calls = pipeline.ragged(setup), list[int]()
    logp_N = pipeline.padded_logp(setup, pack)
    real = LanguageModel.hidden

    def counted(self: LanguageModel, sequences: Any) -> Tensor:
        calls.append(len(sequences))
        return real(self, sequences)

    batch = pipeline.scored(setup, pack)
    monkeypatch.setattr(LanguageModel, "hidden", counted)
    batch = learner.score(setup.method, in_groups(pack.rollouts), batch.signals, batch.clock)
    learner.optimizer = pipeline.Noted(setup.student)
    means, _ = learner.learn(batch, lambda _: 1.0, Stopwatch())
    assert len(calls) == passes
    if kind is None or wanted is None:
        assert "ess" not in means.values()
        return
    weight_N = corrected(logp_N - pack.steps.engine_logp_N.double(), pack.steps.rollout_N, kind, 0.5, wanted)
    assert means.values()["importance"] == pytest.approx(float(weight_N.mean()), rel=1e-5)
    assert means.values()["ess"] == pytest.approx(effective_sample_size(weight_N), rel=1e-5)
    assert means.values()["ess"] < 0.95
