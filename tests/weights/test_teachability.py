"""The release rule: its margins, its change point, its mask; and that a run decides it over whole rollouts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import retort
from retort import registry
from retort.align.sentences import sentences, sentences_of
from retort.core.context import Context
from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.core.steps import Steps
from retort.errors import UserError
from retort.functional import token_losses
from retort.quantities import teacher_margin
from retort.weights.teachability import change_point, kept, segments

N, V, K = 7, 11, 4


def table(rollout_N: torch.Tensor, sentence_N: torch.Tensor | None = None) -> Steps:
    return replace(Steps.of(torch.zeros_like(rollout_N), rollout_N), sentence_N=sentence_N)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N, V)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(*levels: tuple[int, float], noise: float = 0.0, seed: int = 0) -> Tensor:
    flat = torch.cat([torch.full((count,), level, dtype=torch.float64) for count, level in levels])
    return flat + noise * drawn(seed, len(flat))


# --- the change point ---


def test_a_constant_never_drops() -> None:
    assert change_point(step((20, 0.7))) is None
    assert change_point(step((20, 0.7), noise=1e-13)) is None


def test_a_rise_is_no_drop() -> None:
    assert change_point(step((10, 0.2), (10, 0.9))) is None
    for seed in range(50):
        assert change_point(step((10, 0.2), (10, 0.9), noise=0.05, seed=seed)) is None


@pytest.mark.parametrize("place", [3, 8, 15, 17])
def test_a_clear_drop_is_found_where_it_is(place: int) -> None:
    assert change_point(step((place, 0.9), (20 - place, 0.3))) == place
    assert change_point(step((place, 0.9), (20 - place, 0.3), noise=0.02)) == place


def test_both_sides_need_their_length() -> None:
    assert change_point(step((2, 0.9), (3, 0.1))) is None
    assert change_point(step((3, 0.9), (3, 0.1))) == 3
    assert change_point(step((5, 0.9), (5, 0.1)), shortest=6) is None


def test_scale_and_level_do_not_matter() -> None:
    for seed in range(30):
        x = step((12, 0.6), (9, 0.45), noise=0.1, seed=seed)
        found = change_point(x)
        for scale, level in ((1e-6, 0.0), (1e6, 0.0), (3.0, -7.0)):
            assert change_point(scale * x + level) == found


def test_the_simulated_rates_of_the_specification() -> None:
    """local_teachability.md: n = 30, Gaussian noise of 0.1: 5.7 % false alarms, a drop of 0.3 within one in 97.7 %."""
    draw = torch.Generator().manual_seed(0)
    runs = 2000
    noise = 0.1 * torch.randn(runs, 30, generator=draw, dtype=torch.float64)
    drop = torch.where(torch.arange(30) < 15, 0.0, -0.3).double()
    alarms = sum(change_point(x) is not None for x in noise) / runs
    strict = sum(change_point(x, penalty=4) is not None for x in noise) / runs
    near = sum((found := change_point(x + drop)) is not None and abs(found - 15) <= 1 for x in noise) / runs
    assert alarms == pytest.approx(0.057, abs=0.02)
    assert strict == pytest.approx(0.010, abs=0.01)
    assert near == pytest.approx(0.977, abs=0.015)
    assert sum(change_point(x - drop) is not None for x in noise) == 0


def test_against_a_second_writing() -> None:
    for seed in range(40):
        x = step((9, 0.6), (11, 0.45), noise=0.15, seed=seed)
        values, n = x.tolist(), len(x)
        residual = lambda part: sum((v - sum(part) / len(part)) ** 2 for v in part)  # noqa: E731
        flat = n * math.log(residual(values) / n) + math.log(n)
        best = math.inf, None
        for tau in range(3, n - 2):
            left, right = values[:tau], values[tau:]
            if sum(left) / len(left) > sum(right) / len(right):
                bic = n * math.log((residual(left) + residual(right)) / n) + 3 * math.log(n)
                best = min(best, (bic, tau), key=lambda pair: pair[0])
        assert change_point(x) == (best[1] if best[0] < flat else None)


def test_options_of_the_other_reimplementation() -> None:
    spiked = step((10, 0.5), (10, 0.5), noise=0.01)
    spiked[2] = 50.0
    assert change_point(step((10, 0.55), (10, 0.5), noise=0.03), min_drop=5.0) is None
    assert change_point(spiked, robust=True) in (None, *range(3, 18))
    assert change_point(step((10, 0.9), (10, 0.3), noise=0.02), robust=True, min_drop=0.5) == 10


# --- margins ---


def test_margins() -> None:
    student, teacher = drawn(0), drawn(1)
    tokens = torch.zeros(N, dtype=torch.long)
    context = Context.from_logits(student, tokens, {"teacher": Dense.of(teacher, tokens).rows(slice(None))})
    gap, log_gap, advantage = (
        teacher_margin(K, kind).value(context, "teacher")
        for kind in ("gap", "log_gap", "advantage")  # type: ignore[arg-type]
    )
    for n in range(N):
        ids = student[n].argsort(descending=True)[:K]
        p = teacher[n].softmax(-1)[ids]
        first, second = (p / p.sum()).sort(descending=True).values[:2]
        assert gap[n].item() == pytest.approx(float(first - second))
        assert log_gap[n].item() == pytest.approx(float((first / second).log()))
        a = teacher[n].log_softmax(-1)[ids] - student[n].log_softmax(-1)[ids]
        assert advantage[n].item() == pytest.approx(float(a.max() - a.mean()))
    assert ((gap >= 0) & (gap <= 1)).all()
    with pytest.raises(UserError, match="at least 2 candidates"):
        teacher_margin(1)


# --- segments and mask ---


def test_segments_are_sentences_cut_at_their_longest() -> None:
    sentence = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    assert segments(8, sentence, 128).tolist() == [0, 0, 0, 0, 0, 1, 1, 2]
    assert segments(8, sentence, 2).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert segments(5, None, 2).tolist() == [0, 0, 1, 1, 2]


def test_the_mask_falls_once_per_rollout_on_a_border_of_segments() -> None:
    margin = torch.cat([step((20, 0.9), (20, 0.1)), step((30, 0.5))])
    rollouts = torch.tensor([0] * 40 + [1] * 30)
    mask = kept(margin, table(rollouts, torch.arange(70) // 4), 128, change_point)
    assert mask.tolist() == [1.0] * 20 + [0.0] * 20 + [1.0] * 30
    # In any order of the rollouts.
    order = torch.cat([torch.arange(40, 70), torch.arange(40)])
    moved = kept(margin[order], table(rollouts[order], (torch.arange(70) // 4)[order]), 128, change_point)
    assert torch.equal(moved, mask[order])


def dropping() -> tuple[Tensor, Tensor, Tensor]:
    """A rollout of 40 steps: from step 24 on the teacher tells the student's candidates no longer apart."""
    student = drawn(2, 40, V)
    teacher = torch.where(torch.arange(40)[:, None] < 24, 6.0 * drawn(3, 40, V), 0.01 * drawn(3, 40, V))
    return student, teacher, torch.arange(40) % V


def test_a_release_in_the_loss() -> None:
    student, teacher, tokens = dropping()
    student.requires_grad_()
    found = token_losses(
        registry.load("local_teachability", max_segment=4, top_k=K, divide_by="kept"),
        student_logits=student,
        teacher_logits=teacher,
        tokens=tokens,
    )
    assert found.terms["reverse"].weight.tolist() == [1.0] * 24 + [0.0] * 16
    plain = token_losses("opd", student_logits=student[:24], teacher_logits=teacher[:24], tokens=tokens[:24])
    torch.testing.assert_close(found.loss, plain.loss)
    found.loss.backward()
    assert student.grad is not None
    assert student.grad[24:].abs().max() == 0
    assert student.grad[:24].abs().max() > 0


def test_dividing_by_all_weighs_a_kept_token_as_the_wrapped_method_does() -> None:
    student, teacher, tokens = dropping()
    both = {
        by: token_losses(
            registry.load("local_teachability", max_segment=4, top_k=K, divide_by=by),
            student_logits=student,
            teacher_logits=teacher,
            tokens=tokens,
        ).loss.item()
        for by in ("kept", "all")
    }
    assert both["all"] == pytest.approx(both["kept"] * 24 / 40)


def test_it_wraps_methods_with_weights_of_their_own() -> None:
    student, teacher, tokens = dropping()
    settings = {"entropy_threshold": 0.5, "clip": None}
    found = token_losses(
        registry.load("local_teachability", of="eopd", settings=settings, max_segment=4, top_k=K, divide_by="all"),
        student_logits=student,
        teacher_logits=teacher,
        tokens=tokens,
    )
    plain = token_losses(
        registry.load("eopd", **settings), student_logits=student, teacher_logits=teacher, tokens=tokens
    )
    gate = plain.terms["forward"].weight
    assert 0 < gate[:24].sum() < 24
    assert torch.equal(found.terms["forward"].weight, gate * (torch.arange(40) < 24))


@pytest.mark.parametrize("of", ["gopd", "exopd", "listopd", "gkd", "vopd"])
def test_it_wraps_any_method(of: str) -> None:
    """Also those with further views and whole-batch numbers of their own: what is released is not in the loss."""
    student, teacher, tokens = dropping()
    found = token_losses(
        registry.load("local_teachability", of=of, max_segment=4, top_k=K, divide_by="kept"),
        student_logits=student,
        teacher_logits=teacher,
        tokens=tokens,
        extra_views={"base": drawn(5, 40, V)},
    )
    plain = token_losses(
        of,
        student_logits=student[:24],
        teacher_logits=teacher[:24],
        tokens=tokens[:24],
        extra_views={"base": drawn(5, 40, V)[:24]},
    )
    torch.testing.assert_close(found.loss, plain.loss)


def test_wrapping_what_cannot_be_wrapped() -> None:
    with pytest.raises(UserError, match="cannot wrap 'opdd'; did you mean 'opd'"):
        registry.load("local_teachability", of="opdd")
    with pytest.raises(UserError, match="cannot wrap 'local_teachability'"):
        registry.load("local_teachability", of="local_teachability")
    with pytest.raises(UserError, match="'opd' has no setting 'clipp'; did you mean 'clip'"):
        registry.load("local_teachability", settings={"clipp": 0.2})
    with pytest.raises(UserError, match="method.settings.clip"):
        registry.load("local_teachability", settings={"clip": "much"})


# --- sentences ---


class _Characters:
    """A tokenizer of pieces, enough for `sentences`."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("It", " is", " 3.5", ".", " So", " what", "?", " Yes"), [0, 0, 0, 0, 1, 1, 1, 2]),
        (("a", "\n", "b", "\n\n", "c"), [0, 0, 1, 1, 2]),
        (('"Ha', '!"', " he", " said"), [0, 0, 1, 1]),
        (("你好。", "再见"), [0, 1]),
        (("no", " end"), [0, 0]),
    ],
)
def test_sentences(pieces: tuple[str, ...], expected: list[int]) -> None:
    assert sentences(range(len(pieces)), _Characters(*pieces)) == expected  # type: ignore[arg-type]


def test_a_sentence_ends_where_an_environment_replies() -> None:
    pieces = _Characters("go", " north", " now.", " Then", " ", "?")
    sequence = TokenSequence.of([5]).then([0, 1], decided=True).then([5, 5], decided=False).then([2, 3], decided=True)
    turns = torch.tensor([0, 0, 1, 1])
    rollout = Rollout(Prompt("a", (Message("user", "?"),)), (sequence,), turn_A=turns)
    assert sentences_of(rollout, pieces) == [0, 0, 1, 2]  # type: ignore[arg-type]
    assert sentences_of(replace(rollout, turn_A=None), pieces) == [0, 0, 0, 1]  # type: ignore[arg-type]


def test_sentences_of_a_real_tokenizer() -> None:
    from support import make_tokenizer

    tokenizer = make_tokenizer(words=["so", "it", "is", ".", "the", "answer", "3"])
    ids = tokenizer("so it is . the answer is 3 . so", add_special_tokens=False)["input_ids"]
    assert sentences(ids, tokenizer) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


# --- in a run ---


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run(tiny_run: dict[str, Any], tmp_path: Path, updates: int) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    settings |= {"rollout": {"prompts": 6, "max_new_tokens": 24, "max_prompt_tokens": 32}}
    settings |= {"optimizer": {**settings["optimizer"], "updates": updates}, "eval": {"problems": 0}}
    method = {"name": "local_teachability", "max_segment": 2, "top_k": K}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    run = retort.distill(**named, settings=settings, method=method, out=str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["kept_fraction"] <= 1 for row in rows)
    assert any(row["kept_fraction"] < 1 for row in rows), "nothing was ever released, so this tests nothing"
    for row in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines():
        mask = json.loads(row)["columns"]["kept_fraction"]
        assert mask == sorted(mask, reverse=True)
    assert run.step == 4


def test_the_cut_into_micro_batches_does_not_matter(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data")}
    settings |= {"rollout": {"prompts": 6, "max_new_tokens": 24, "max_prompt_tokens": 32}, "eval": {"problems": 0}}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    losses = []
    for tokens in (1, 10**6):
        out = tmp_path / str(tokens)
        changed = {**settings, "optimizer": {**settings["optimizer"], "batch_tokens": tokens}, "steps": 2}
        method = {"name": "local_teachability", "max_segment": 2, "top_k": K}
        retort.distill(**named, settings=changed, method=method, out=str(out))
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- the published form ---


def test_the_log_margin_of_a_candidate_that_is_ruled_out_is_a_number() -> None:
    student, teacher = drawn(0, 3, V), drawn(1, 3, V)
    ids = student.topk(K).indices
    teacher[0, ids[0, 1:]] = -math.inf  # one is left
    teacher[1, ids[1]] = -math.inf  # none is
    tokens = torch.zeros(3, dtype=torch.long)
    context = Context.from_logits(student, tokens, {"teacher": Dense.of(teacher, tokens).rows(slice(None))})
    log_gap = teacher_margin(K).value(context, "teacher").tolist()
    assert log_gap[:2] == pytest.approx([100.0, 0.0])
    assert teacher_margin(K, "gap").value(context, "teacher").tolist()[:2] == pytest.approx([1.0, 0.0])
    assert teacher_margin(K, "advantage").value(context, "teacher").isfinite().all()
    assert teacher_margin(K, "advantage").value(context, "teacher")[1].item() == pytest.approx(0.0)


def test_each_trajectory_keeps_its_mass() -> None:
    """The weight is |y| over the tokens kept; the loss is the mean over kept tokens, times |y|, over all tokens."""
    student, teacher, tokens = dropping()
    student, teacher, tokens = (torch.cat([x, x[:8]]) for x in (student, teacher, tokens))
    rollouts = torch.tensor([0] * 40 + [1] * 8)
    method = registry.load("local_teachability", max_segment=4, top_k=K)
    given = {"student_logits": student, "teacher_logits": teacher, "tokens": tokens, "rollouts": rollouts}
    found = token_losses(method, **given).terms["reverse"]
    assert found.weight.tolist() == pytest.approx([40 / 24] * 24 + [0.0] * 16 + [1.0] * 8)
    gap = teacher.log_softmax(-1).gather(1, tokens[:, None]) - student.log_softmax(-1).gather(1, tokens[:, None])
    wanted = -(40 * gap[:24].mean() + gap[40:].sum()) / 48
    assert token_losses(method, **given).loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    # A neighbour changes nothing of it.
    alone = token_losses(method, **{name: values[:40] for name, values in given.items()})
    assert torch.equal(alone.terms["reverse"].weight, found.weight[:40])


def test_the_series_is_the_log_of_one_more_than_the_mean() -> None:
    seen: list[Tensor] = []

    def find(series: Tensor) -> None:
        seen.append(series)

    kept(torch.tensor([1.0, 3.0, 0.0, 0.5, 7.0]), table(torch.zeros(5, dtype=torch.long)), 2, find)
    assert seen[0].tolist() == pytest.approx([math.log(3.0), math.log(1.25), math.log(8.0)])
