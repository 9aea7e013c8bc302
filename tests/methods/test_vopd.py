"""vOPD's curves: the exact variance of a step's gradient against enumeration, and what Adam's moments tell of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from report_page import Page
from torch import Tensor

import retort
from retort.core.context import Context
from retort.core.parts import Baseline
from retort.core.signals import Dense
from retort.estimators import reverse_kl_value
from retort.quantities import gradient_variance
from retort.report import build_report
from retort.train.learning.update import batch_variance
from retort.train.learning.variance import adam_variance

N, VOCAB = 6, 9


def context(spread: float = 1.0, dtype: torch.dtype = torch.float64, vocab: int = VOCAB) -> tuple[Context, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, vocab, generator=draw, dtype=torch.float64) for _ in range(2))
    teacher = (spread * teacher).to(dtype)
    tokens = torch.zeros(N, dtype=torch.long)
    rows = Dense.of(teacher, tokens).rows(torch.arange(N))
    return Context.from_logits(student.to(dtype), tokens, {"teacher": rows}), teacher


def constant(b_N: Tensor) -> Baseline:
    return Baseline("constant", lambda context, view: b_N)


def enumerated(student: Tensor, teacher: Tensor, b_N: Tensor) -> Tensor:
    """E|A g|^2 - |E A g|^2 over every token, gradients by autograd."""
    found = []
    for z, t, b in zip(student, teacher.log_softmax(-1), b_N, strict=True):
        logits = z.clone().requires_grad_()
        logp = logits.log_softmax(-1)
        g_VV = torch.stack([torch.autograd.grad(logp[v], logits, retain_graph=True)[0] for v in range(len(z))])
        g_VV = g_VV * (t - logp.detach() - b)[:, None]
        p_V = logp.detach().exp()
        mean_V = (p_V[:, None] * g_VV).sum(0)
        found.append((p_V * g_VV.square().sum(-1)).sum() - mean_V.square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("top_k", [None, 1, 3, VOCAB])
@pytest.mark.parametrize("coef", [0.0, 0.5, 1.0])
def test_the_exact_variance_is_that_of_every_token(top_k: int | None, coef: float) -> None:
    here, teacher = context(spread=2.0)
    baseline = reverse_kl_value(top_k)
    ours = gradient_variance(baseline, coef=coef).value(here, "teacher")
    b_N = coef * baseline.value(here, "teacher")
    torch.testing.assert_close(ours, enumerated(here.student.logits_CV, teacher, b_N), rtol=1e-11, atol=1e-12)
    if coef == 0.0:
        torch.testing.assert_close(ours, gradient_variance().value(here, "teacher"), rtol=1e-13, atol=1e-13)


def moments(here: Context, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """E[r |g|^2] and E|g|^2 of each step."""
    logp = here.student.logits_CV.log_softmax(-1)
    p = logp.exp()
    square = 1 - 2 * p + p.square().sum(-1, keepdim=True)
    reward = teacher.log_softmax(-1) - logp
    return (p * reward * square).sum(-1), (p * square).sum(-1)


def test_what_the_baseline_takes_away_is_the_papers_expression() -> None:
    """The exact form of Eq. 11: 2 V E[r |g|^2] - V^2 E|g|^2."""
    here, teacher = context(spread=3.0)
    plain = gradient_variance().value(here, "teacher")
    based = gradient_variance(reverse_kl_value()).value(here, "teacher")
    v_N = reverse_kl_value().value(here, "teacher")
    first, second = moments(here, teacher)
    torch.testing.assert_close(plain - based, 2 * v_N * first - v_N.square() * second, rtol=1e-10, atol=1e-12)


def test_no_scalar_baseline_beats_the_optimal_one() -> None:
    """Eq. 23: b* = E[r |g|^2] / E|g|^2."""
    here, teacher = context(spread=2.0)
    first, second = moments(here, teacher)
    best_N = first / second
    least = gradient_variance(constant(best_N)).value(here, "teacher")
    for shift in (-1.0, -0.1, 0.1, 1.0):
        shifted = gradient_variance(constant(best_N + shift)).value(here, "teacher")
        torch.testing.assert_close(shifted - least, shift**2 * second, rtol=1e-9, atol=1e-12)
    assert bool((gradient_variance(reverse_kl_value()).value(here, "teacher") >= least).all())


def four(student: Tensor, teacher: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact variances [N] of the plain gradient, and with the value, the top-k value and the best scalar subtracted."""
    tokens = torch.zeros(len(student), dtype=torch.long)
    here = Context.from_logits(student, tokens, {"teacher": Dense.of(teacher, tokens).rows(torch.arange(len(student)))})
    first, second = moments(here, teacher)
    baselines = (None, reverse_kl_value(), reverse_kl_value(top_k), constant(first / second))
    plain, full, cut, best = (gradient_variance(baseline).value(here, "teacher") for baseline in baselines)
    return plain, full, cut, best


def pairs(count: int, vocab: int, student: float, reward: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student logits of that spread, and a teacher apart from them by log-ratios of the other spread."""
    draw = torch.Generator().manual_seed(seed)
    z, apart = (torch.randn(count, vocab, generator=draw, dtype=torch.float64) for _ in range(2))
    return student * z, student * z + reward * apart


def test_the_wider_the_rewards_the_more_a_baseline_takes_away() -> None:
    """50 ids, one position, 400 of them at each spread of the rewards.

    An outside check of this order found, for one pair at three spreads, plain .278, 4.07, 34.2; value .263, 2.65, 5.26;
    top-10 .263, 2.84, 5.12; best scalar .262, 2.65, 4.76. How its pair was made is not known: independent and additive
    normal logits of student spreads 0.5 to 3, reward spreads 0.3 to 10 and 40 seeds give each of its first two rows to
    2 per cent, but no pair gives all three rows. So its order is tested, and not its digits.
    """
    saved = list[float]()
    for reward in (0.5, 2.0, 6.0):
        plain, full, cut, best = four(*pairs(400, 50, 1.0, reward), top_k=10)
        assert (best <= full * (1 + 1e-12)).all(), "no scalar baseline beats the best one"
        assert (best <= cut * (1 + 1e-12)).all()
        assert (best <= plain * (1 + 1e-12)).all()
        assert full.mean() < plain.mean()
        assert cut.mean() < plain.mean()
        saved.append(float((1 - full / plain).median()))
    assert saved == sorted(saved)
    assert saved[0] < 0.1
    assert saved[-1] > 0.6


def test_the_baseline_is_the_rule_and_not_a_law() -> None:
    """3,000 random pairs of 30 ids: lower variance in 73 per cent of them, at a median ratio of .95 (a checked claim).

    The claim leaves the spreads open, and they decide: at a student's spread of 1 it is nearly always lower, at 4 in
    60 per cent. Spreads of 2.5 (student) and 0.7 (rewards) give both of its numbers. Intervals: binomial, 99.9 per
    cent, plus half a digit of the claim; of the median by the ranks between which it lies.
    """
    count, z = 3000, 3.2905
    for seed in (0, 1, 2):
        plain, full, _, best = four(*pairs(count, 30, 2.5, 0.7, seed), top_k=10)
        assert (best <= full * (1 + 1e-12)).all()
        share = float((full < plain).double().mean())
        assert abs(share - 0.73) < z * math.sqrt(0.73 * 0.27 / count) + 0.005
        ratio = (full / plain).sort().values
        reach = math.ceil(z * math.sqrt(count) / 2)
        assert ratio[count // 2 - reach] - 0.005 < 0.95 < ratio[count // 2 + reach] + 0.005
        assert (full > plain).any(), "it must never be promised pointwise"
    wide = four(*pairs(count, 30, 2.5, 3.0), top_k=10)
    assert float((wide[1] < wide[0]).double().mean()) > 0.9, "gains are large where the rewards are spread"


def test_equal_or_certain_students_have_no_noise() -> None:
    here, _ = context()
    tokens = here.steps.tokens_N
    same = Dense.of(here.student.logits_CV, tokens).rows(torch.arange(N))
    equal = Context.from_logits(here.student.logits_CV, tokens, {"teacher": same})
    assert gradient_variance(reverse_kl_value()).value(equal, "teacher").abs().max() < 1e-25
    sure = torch.full((N, VOCAB), -math.inf, dtype=torch.float64)
    sure[:, 2] = 0.0
    certain = Context.from_logits(sure, tokens, here.signals)
    assert gradient_variance(reverse_kl_value()).value(certain, "teacher").tolist() == [0.0] * N


def test_an_id_the_teacher_rules_out_is_infinite_noise_only_where_it_may_be_written() -> None:
    here, teacher = context()
    tokens, banned = here.steps.tokens_N, teacher.clone()
    banned[0, 3] = banned[1, 3] = -math.inf
    student = here.student.logits_CV.clone()
    student[1, 3] = -math.inf
    rows = Dense.of(banned, tokens).rows(torch.arange(N))
    for baseline in (None, reverse_kl_value(), reverse_kl_value(2)):
        found = gradient_variance(baseline).value(Context.from_logits(student, tokens, {"teacher": rows}), "teacher")
        assert found[0].item() == math.inf
        assert found[1:].isfinite().all()


def test_fp32_over_a_large_vocabulary() -> None:
    exact, single = (context(2.0, dtype, 150_000)[0] for dtype in (torch.float64, torch.float32))
    for baseline in (None, reverse_kl_value(), reverse_kl_value(20)):
        part = gradient_variance(baseline)
        torch.testing.assert_close(
            part.value(single, "teacher").double(), part.value(exact, "teacher"), rtol=1e-4, atol=0.0
        )


@pytest.mark.parametrize("fused", [False, True])
def test_adams_moments_tell_the_variance_of_noise_around_a_mean(fused: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.zeros(2000)),
        torch.nn.Parameter(torch.zeros(1000)),
        torch.nn.Parameter(torch.zeros(3)),
    ]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.999), fused=fused)
    for step in range(300):
        for weight, spread in zip(weights[:2], (0.5, 2.0), strict=True):  # the last is never used
            weight.grad = 3.0 + spread * torch.randn(len(weight), generator=draw)
        optimizer.step()
        if step == 0:
            assert adam_variance(optimizer) == pytest.approx(0.0, abs=0.1)
    # The mean of m^2 is itself too large by (1 - beta1) / (1 + beta1) of the variance: 1/19.
    assert adam_variance(optimizer) == pytest.approx((2000 * 0.25 + 1000 * 4.0) * 18 / 19, rel=0.03)


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_run_logs_both(tiny_run: dict[str, Any], tmp_path: Path, top_k: int | None) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    method = {"name": "vopd", "top_k": top_k}
    retort.distill(**named, settings={**settings, "steps": 2}, method=method, out=str(tmp_path / "run"))
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["gradient_variance"] > 0
    assert first["gradient_variance_plain"] > 0
    assert second["adam_variance"] > 0
    assert "gradient_variance" not in second, "it is measured at every tenth batch"


@pytest.mark.parametrize("name", ["vopd", "eopd", "gkd"])
def test_the_variance_of_a_step_is_that_of_its_prompts_gradients(tiny_run: dict[str, Any], name: str) -> None:
    """Against each visit's gradient by autograd, from a padded forward pass: n / (n - 1) sum |G_p - mean|^2."""
    setup = pipeline.prepared(tiny_run, name)
    pack = pipeline.ragged(setup)
    losses = pipeline.padded_losses(setup, pack)
    parameters = [p for p in setup.student.model.parameters() if p.requires_grad]
    own: list[Tensor] = []
    visits = int(pack.group_R.max()) + 1
    assert visits < len(pack.rollouts), "two answers to one prompt are one draw"
    for visit in range(visits):
        mine_N = (pack.steps.group_N == visit).double() / len(pack)
        part = torch.stack([(term.value * term.weight * mine_N).sum() for term in losses.terms.values()]).sum()
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters, retain_graph=True)]))
    gradients = torch.stack(own)
    wanted = visits / (visits - 1) * (gradients - gradients.mean(0)).square().sum()
    batch = pipeline.scored(setup, pack)
    for tokens in (10**6, 1):  # however micro-batches are cut
        found = batch_variance(pipeline.cut_to(setup, tokens).learner.passes, batch, range(len(pack.rollouts)))
        assert found == pytest.approx(float(wanted), rel=1e-5)
    assert all(p.grad is None for p in parameters)
    assert batch_variance(setup.learner.passes, batch, [0, 1]) is None, "one visit has no variance"


def test_the_variance_estimates_that_of_the_gradient(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bias: over many batches drawn at random, its mean is the variance of the batches' gradients."""
    setup = pipeline.prepared(tiny_run, "opd")
    gradients, found = [], []
    for seed in range(36):
        pack = pipeline.even(setup, seed)
        batch = pipeline.scored(setup, pack)
        estimate = batch_variance(setup.learner.passes, batch, range(len(pack.rollouts)))
        assert estimate is not None
        found.append(estimate)
        (step, _) = pipeline.learnt(setup, batch)
        gradients.append(torch.cat([g.flatten() for g in step.gradients.values()]))
    stacked = torch.stack(gradients)
    apart = (stacked - stacked.mean(0)).square().sum(1) * len(stacked) / (len(stacked) - 1)
    error = (apart - torch.tensor(found)).std() / math.sqrt(len(found))
    assert abs(float(apart.mean()) - sum(found) / len(found)) < 3.3 * float(error)
    assert sum(found) / len(found) > 3.3 * float(error), "or the test would pass by being blind"


@pipeline.models_once()
def test_measuring_the_variance_of_a_step_changes_nothing(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    runs = {}
    for every in (0, 2):
        changed = {**settings, "steps": 4, "eval": {"problems": 0}, "record": {"gradient_variance_every": every}}
        out = str(tmp_path / str(every))
        runs[every] = retort.distill(**named, settings=changed, method="vopd", out=out)
    lines = [json.loads(line) for line in (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()]
    assert ["batch_gradient_variance" in line for line in lines] == [True, False, True, False]
    assert all(line["batch_gradient_variance"] > 0 for line in lines[::2])
    plots = Page(build_report([tmp_path / "2"], tmp_path / "report.html")).plots()
    assert len(plots["Gradient’s variance over all weights"]["series"]) == 2
    assert len(plots["Gradient’s variance at a token"]["series"]) == 2
    assert "batch_gradient_variance" not in (tmp_path / "0" / "metrics.jsonl").read_text()
    theirs = dict(runs[2].prepared.student.model.named_parameters())
    for parameter, value in runs[0].prepared.student.model.named_parameters():
        assert torch.equal(value, theirs[parameter]), parameter
