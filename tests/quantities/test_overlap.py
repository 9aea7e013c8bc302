"""Overlap of two top-k lists: the invariants of the paper's diagnostics, and a second writing of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.signals import Dense, TopK
from retort.divergences import kl_values
from retort.errors import UserError
from retort.evaluate.ranks import auroc
from retort.quantities import entropy_gap, overlap_advantage, overlap_mass, overlap_ratio, overlap_teacher_mass
from retort.train.learning.diagnose import position_chunks, watching

N, V = 9, 12


def drawn(seed: int) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def context(student: Tensor, teacher: Tensor) -> Context:
    tokens = torch.zeros(len(student), dtype=torch.long)
    return Context.from_logits(student, tokens, {"teacher": Dense.of(teacher, tokens).rows(slice(None))})


def test_agreement() -> None:
    same = context(drawn(0), drawn(0))
    assert overlap_ratio(4).value(same, "teacher").tolist() == [1.0] * N
    assert overlap_advantage(4).value(same, "teacher").abs().max() < 1e-12
    assert entropy_gap().value(same, "teacher").abs().max() < 1e-12
    expected = drawn(0).softmax(-1).sort(descending=True).values[:, :4].sum(-1)
    for mass in (overlap_mass(4), overlap_teacher_mass(4)):
        torch.testing.assert_close(mass.value(same, "teacher"), expected)


def test_nothing_in_common_is_no_number_and_no_mass() -> None:
    student = torch.arange(V, dtype=torch.float64).repeat(N, 1)
    apart = context(student, -student)
    assert overlap_ratio(3).value(apart, "teacher").tolist() == [0.0] * N
    assert overlap_advantage(3).value(apart, "teacher").isnan().all()
    assert overlap_mass(3).value(apart, "teacher").tolist() == [0.0] * N
    assert overlap_teacher_mass(3).value(apart, "teacher").tolist() == [0.0] * N


@pytest.mark.parametrize("k", [1, 3, 7, V, 10**6])
def test_against_loops(k: int) -> None:
    student, teacher = drawn(1), drawn(2)
    here = context(student, teacher)
    ratio, advantage, mass, their_mass, gap = (
        part.value(here, "teacher").tolist()
        for part in (overlap_ratio(k), overlap_advantage(k), overlap_mass(k), overlap_teacher_mass(k), entropy_gap())
    )
    for n in range(N):
        p, q = student[n].softmax(-1), teacher[n].softmax(-1)
        ours, theirs = (set(x.argsort(descending=True)[: min(k, V)].tolist()) for x in (p, q))
        shared = sorted(ours & theirs)
        assert ratio[n] == pytest.approx(len(shared) / min(k, V))
        assert mass[n] == pytest.approx(float(p[shared].sum()))
        assert their_mass[n] == pytest.approx(float(q[shared].sum()))
        entropies = [-float((x * x.log()).sum()) for x in (p, q)]
        assert gap[n] == pytest.approx(abs(entropies[0] - entropies[1]))
        if not shared:
            assert math.isnan(advantage[n])
            continue
        a, b = p[shared] / p[shared].sum(), q[shared] / q[shared].sum()
        # The advantage is minus the reverse KL of the renormalised pair, by the size of the overlap: never above 0.
        expected = -float(kl_values(a.log()[None], b.log()[None])) / len(shared)
        assert advantage[n] == pytest.approx(expected, abs=1e-12)
        assert advantage[n] <= 1e-12


def test_the_teachers_own_top_k_is_enough() -> None:
    student, teacher = drawn(3), drawn(4)
    tokens = torch.zeros(N, dtype=torch.long)
    logp, ids = teacher.log_softmax(-1).topk(4)
    small = Context.from_logits(student, tokens, {"teacher": TopK(tokens, ids_NK=ids, logp_NK=logp).rows(slice(None))})
    for part in (overlap_ratio(4), overlap_advantage(4), overlap_mass(4), overlap_teacher_mass(4)):
        ours, theirs = part.value(small, "teacher"), part.value(context(student, teacher), "teacher")
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_both_lists_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    here, calls = context(drawn(1), drawn(2)), []
    found = here.student.topk
    monkeypatch.setattr(here.student, "topk", lambda k: (calls.append(k), found(k))[1])
    for part in (overlap_ratio(4), overlap_advantage(4), overlap_mass(4), overlap_teacher_mass(4)):
        part.value(here, "teacher")
    assert calls == [4]


def test_k_is_at_least_one() -> None:
    with pytest.raises(UserError, match="k must be at least 1"):
        overlap_ratio(0)


def test_every_method_is_watched_and_keeps_its_own_curves() -> None:
    from retort.registry import load

    watched = watching(load("opd"), 16, 3)
    names = [watch.name for watch in watched.watch]
    assert len(set(names)) == len(names)
    assert {"overlap_ratio", "overlap_advantage", "overlap_mass", "entropy_gap"} <= set(names)
    assert watched.as_published
    assert "its top-16" in map(str, watched.optional_needs(step=3))
    assert "its top-16" not in map(str, watched.optional_needs(step=4))
    plain = load("opd")
    assert watching(plain, 0, 1) is plain


def test_auroc() -> None:
    right = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([3.0, 4.0, 1.0, 2.0]), right) == 1.0
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), right) == 0.0
    assert auroc(torch.tensor([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert auroc(torch.tensor([2.0, 4.0, 1.0, 3.0]), right) == 0.75
    assert auroc(torch.tensor([2.0, 4.0, math.nan, 3.0]), right) == 0.5
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool)) is None


def test_position_chunks_are_the_papers_or_quarters() -> None:
    assert position_chunks(4096) == [0, 1024, 2048, 3072]
    assert position_chunks(14) == [0, 4, 8, 12]
    assert position_chunks(1) == [0]
