"""SEAD: its zones, its annealing, what each zone is taught, and that a batch's zones do not depend on micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import retort
from retort.core.schedules import anneal
from retort.core.signals import entropy
from retort.divergences import kl_values
from retort.errors import UserError
from retort.functional import token_losses
from retort.registry import load
from retort.weights.zones import SILENT, SURE, UNSURE, zones

N, VOCAB = 40, 11


def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    scale = 3 * torch.rand(N, 1, generator=draw, dtype=torch.float64)
    student, teacher = (torch.randn(N, VOCAB, generator=draw, dtype=torch.float64) * scale for _ in range(2))
    return student.requires_grad_(), teacher


def losses(student: Tensor, teacher: Tensor, **settings: Any) -> Any:
    more = {name: settings.pop(name) for name in ("step", "total_steps", "rollouts") if name in settings}
    tokens = torch.zeros(N, dtype=torch.long)
    return token_losses(load("sead", **settings), student_logits=student, teacher_logits=teacher, tokens=tokens, **more)


def by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    """The zone of each step, by sorting lists."""
    h_t, h_s = (entropy(logits.log_softmax(-1)).tolist() for logits in (teacher, student.detach()))
    unsure = sorted(range(N), key=lambda t: (h_t[t], t))[-4:]
    rest = sorted((t for t in range(N) if t not in unsure), key=lambda t: (h_s[t], t))
    return torch.tensor([UNSURE if t in unsure else SILENT if t in rest[:20] else SURE for t in range(N)])


def test_the_zones_and_what_they_are_taught() -> None:
    student, teacher = pair()
    zone = by_hand(student, teacher)
    found = losses(student, teacher, step=0, total_steps=10)
    assert torch.equal(found.terms["sure"].weight, (zone == SURE).double())
    assert torch.equal(found.terms["unsure"].weight, (zone == UNSURE).double())
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    wanted = (kl_values(p, q)[zone == SURE].sum() + 0.8 * kl_values(q, p)[zone == UNSURE].sum()) / 20
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.loss, student)
    assert gradient[zone == SILENT].abs().max() == 0.0
    assert gradient[zone != SILENT].abs().sum(-1).min() > 0.0


def test_the_figure_blends_where_the_equation_fades() -> None:
    student, teacher = pair()
    unsure = by_hand(student, teacher) == UNSURE
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    reverse = kl_values(p, q)[by_hand(student, teacher) == SURE].sum()
    for step, alpha in ((0, 0.8), (5, 0.4), (10, 0.0)):
        mixed = alpha * kl_values(q, p)[unsure].sum() + (1 - alpha) * kl_values(p, q)[unsure].sum()
        found = losses(student, teacher, unsure_loss="blended", step=step, total_steps=10).loss
        torch.testing.assert_close(found, (reverse + mixed) / 20, rtol=1e-12, atol=0)
        faded = losses(student, teacher, step=step, total_steps=10).loss
        wanted = (reverse + alpha * kl_values(q, p)[unsure].sum()) / 20
        torch.testing.assert_close(faded, wanted, rtol=1e-12, atol=0)


def test_annealing_of_the_specification() -> None:
    alpha = anneal(0.8, 0.0)
    found = [alpha(step, 100) for step in (0, 25, 50, 75, 100)]
    assert found == pytest.approx([0.8, 0.6828, 0.4, 0.1172, 0.0], abs=5e-5)
    assert alpha(3, None) == 0.8


@pytest.mark.parametrize(("silent", "unsure"), [(0.5, 0.1), (0.0, 1.0), (1.0, 0.0), (0.333, 0.333), (0.2, 0.8)])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_zones_partition_with_exact_shares(count: int, silent: float, unsure: float) -> None:
    draw = torch.Generator().manual_seed(1)
    for ties in (False, True):
        teacher, student = (torch.rand(count, generator=draw).double() for _ in range(2))
        if ties:
            teacher, student = torch.zeros(count), torch.zeros(count)
        found = zones(teacher, student, silent=silent, unsure=unsure)
        counts = [int((found == zone).sum()) for zone in (SILENT, SURE, UNSURE)]
        assert sum(counts) == count
        assert abs(counts[0] - silent * count) <= 1
        assert abs(counts[2] - unsure * count) <= 1
        assert torch.equal(found, zones(teacher, student, silent=silent, unsure=unsure))


def test_no_token_taught_is_no_loss() -> None:
    student, teacher = pair()
    found = losses(student, teacher, silent_share=1.0, unsure_share=0.0).loss
    assert found.item() == 0.0
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.abs().max() == 0.0


def test_shares_in_every_rollout() -> None:
    student, teacher = pair()
    rollouts = torch.arange(N) // 20
    found = losses(student, teacher, scope="rollout", rollouts=rollouts)
    for own in (rollouts == 0, rollouts == 1):
        assert int(found.terms["unsure"].weight[own].sum()) == 2
        assert int(found.terms["sure"].weight[own].sum()) == 8


@pytest.mark.parametrize("scope", ["batch", "rollout"])
def test_a_batch_with_nothing_counted_is_no_loss(scope: str) -> None:
    student, teacher = pair()
    method, nothing = load("sead", scope=scope), torch.zeros(N, dtype=torch.bool)
    tokens = torch.zeros(N, dtype=torch.long)
    found = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tokens, mask=nothing)
    assert found.loss.item() == 0.0


def test_shares_must_make_sense() -> None:
    with pytest.raises(UserError, match="at most 1 together"):
        load("sead", silent_share=0.7, unsure_share=0.4)


def test_the_cut_into_micro_batches_does_not_matter(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    found = []
    for tokens in (1, 10**6):
        out = tmp_path / str(tokens)
        changed = {**settings, "optimizer": {**settings["optimizer"], "batch_tokens": tokens}, "steps": 2}
        retort.distill(**named, settings=changed, method="sead", out=str(out))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss"] for row in rows])
        assert all(row["loss"] > 0 for row in rows)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
