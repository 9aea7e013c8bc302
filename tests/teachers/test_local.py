"""The local teacher: what it returns, in whose words, and when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retort.align import StopMap, StopTokens, stop_map
from retort.align.pair import SameIds
from retort.core.needs import DENSE, ENTROPY, SAMPLED, Need
from retort.core.rollouts import Message, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense, Sampled, TopK
from retort.errors import SignalError
from retort.models.load import load_model
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View


def prompt(text: str = "3 + 4 =") -> Prompt:
    return Prompt("p", (Message("user", text),))


def rollout(lm: Any, actions: list[int], text: str = "3 + 4 =") -> Rollout:
    ids = lm.tokenizer(text)["input_ids"]
    return Rollout(prompt(text), TokenSequence.of(ids).then(actions, decided=True))


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    folder = model_folder(seed=2, padded_to=80)
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))


def teacher(lm: Any, **more: Any) -> LocalTeacher:
    return LocalTeacher(lm, **{"alignment": SameIds(61), "batch_tokens": 8, **more})


def test_every_signal_says_the_same(lm: Any) -> None:
    pack = Pack.of([rollout(lm, [12, 13, 2]), rollout(lm, [7]), rollout(lm, [20, 2], "1 =")])
    dense = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({DENSE})))
    top = teacher(lm).score(
        in_groups(pack.rollouts), ScoreRequest(View(), frozenset({Need("topk", 5), ENTROPY, SAMPLED}))
    )
    sampled = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({SAMPLED})))
    assert isinstance(dense, Dense)
    assert isinstance(top, TopK)
    assert isinstance(sampled, Sampled)
    rows = dense.rows(slice(None), 61)
    torch.testing.assert_close(top.rows(slice(None)).sampled_logp_N, rows.sampled_logp_N)
    torch.testing.assert_close(sampled.logp_N, rows.sampled_logp_N)
    torch.testing.assert_close(top.rows(slice(None)).entropy_N, rows.entropy_N)
    torch.testing.assert_close(top.logp_NK, rows.topk(5)[1])
    # against transformers, sequence by sequence, with the padding rows left out
    expected = []
    for item in pack.rollouts:
        with torch.no_grad():
            logp = lm.model(input_ids=item.sequence.tokens_L[None]).logits[0, :, :61].log_softmax(-1)
        places = item.sequence.action_mask_L.nonzero().squeeze(-1)
        expected.append(logp[places - 1].gather(-1, item.sequence.actions_A[:, None]).squeeze(-1))
    torch.testing.assert_close(sampled.logp_N, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_temperature_divides_the_logits(lm: Any) -> None:
    pack = Pack.of([rollout(lm, [12, 13])])
    warm = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({DENSE}), 2.0)).rows(slice(None))
    plain = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({DENSE}))).rows(slice(None))
    torch.testing.assert_close(warm.logp_NV, (plain.logp_NV / 2).log_softmax(-1))


def test_stops_are_swapped_in_what_it_reads_and_in_what_it_says(lm: Any) -> None:
    ours, theirs = 2, 4
    mapped = teacher(lm, alignment=SameIds(61, StopMap({ours: theirs, theirs: ours})))
    student_pack = Pack.of([rollout(lm, [12, ours])])
    teacher_pack = Pack.of([rollout(lm, [12, theirs])])
    said = mapped.score(in_groups(student_pack.rollouts), ScoreRequest(View(), frozenset({DENSE}))).rows(slice(None))
    own = (
        teacher(lm).score(in_groups(teacher_pack.rollouts), ScoreRequest(View(), frozenset({DENSE}))).rows(slice(None))
    )
    torch.testing.assert_close(said.sampled_logp_N, own.sampled_logp_N)
    torch.testing.assert_close(said.logp_NV[:, ours], own.logp_NV[:, theirs])
    torch.testing.assert_close(said.logp_NV[:, theirs], own.logp_NV[:, ours])
    torch.testing.assert_close(said.entropy_N, own.entropy_N)


@pytest.mark.parametrize(("ours", "theirs"), [((2,), (4, 2)), ((2,), (2, 4)), ((2,), (2, 3, 4)), ((4, 2), (3, 4, 5))])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_stops_of_the_teacher_are_the_students(
    lm: Any, ours: tuple[int, ...], theirs: tuple[int, ...], temperature: float
) -> None:
    """The probabilities of merged stops are added, at the temperature at which they are read."""
    stops = stop_map(StopTokens(frozenset(ours), ours[0]), StopTokens(frozenset(theirs), theirs[0]))
    asked = {need.kind: frozenset({need}) for need in (DENSE, Need("topk", 61), SAMPLED)}
    groups, read = ([(rollout(lm, [12, ids[0]]),)] for ids in (ours, theirs))
    mapped = teacher(lm, alignment=SameIds(61, stops))
    said = mapped.score(groups, ScoreRequest(View(), asked["dense"], temperature)).rows(slice(None))
    own = teacher(lm).score(read, ScoreRequest(View(), asked["dense"], temperature)).rows(slice(None))
    own_NV = own.logp_NV.exp()
    ended = sorted({ours[0]} | (set(theirs) - set(ours)))
    moved = {stops.get(i, i) for i in range(61)} - {stops.get(i, i) for i in ended}
    p_NV = said.logp_NV.exp()
    torch.testing.assert_close(p_NV.sum(-1), torch.ones(2))
    mass_N = own_NV[:, [stops.get(i, i) for i in (stops.into, *stops.merged)]].sum(-1)
    torch.testing.assert_close(p_NV[:, ours[0]], mass_N, rtol=1e-5, atol=1e-6)
    assert bool((said.logp_NV[:, list(stops.merged)] > -40).all()), "never an infinite reverse KL"
    assert bool((p_NV[:, list(stops.merged)] < 2e-6).all())
    for i in sorted(moved - set(theirs) - set(ours)):
        torch.testing.assert_close(p_NV[:, i], own_NV[:, stops.get(i, i)])
    top = mapped.score(groups, ScoreRequest(View(), asked["topk"], temperature))
    assert isinstance(top, TopK)
    scattered_NV = torch.zeros_like(p_NV).scatter(-1, top.ids_NK, top.logp_NK.exp())
    torch.testing.assert_close(scattered_NV, p_NV)
    sampled = mapped.score(groups, ScoreRequest(View(), asked["sampled"], temperature))
    assert isinstance(sampled, Sampled)
    torch.testing.assert_close(sampled.logp_N, said.sampled_logp_N)


def test_a_view_changes_the_prompt_and_never_the_answer(lm: Any) -> None:
    pack = Pack.of([rollout(lm, [12, 13])])
    view = View(render=lambda seen: replace(seen.prompt, messages=(Message("user", "7 3 + 4 ="),)))
    said = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(view, frozenset({SAMPLED})))
    other = teacher(lm).score(
        in_groups([rollout(lm, [12, 13], "7 3 + 4 =")]), ScoreRequest(View(), frozenset({SAMPLED}))
    )
    assert isinstance(said, Sampled)
    assert isinstance(other, Sampled)
    torch.testing.assert_close(said.logp_N, other.logp_N)
    assert torch.equal(said.tokens_N, pack.steps.tokens_N)


def test_a_head_that_changed_after_scoring_is_noticed(lm: Any) -> None:
    pack = Pack.of([rollout(lm, [12, 13])])
    dense = teacher(lm).score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({DENSE})))
    with torch.no_grad():
        lm.head().weight_VD.mul_(1.0)
    with pytest.raises(SignalError, match="changed after it had scored"):
        dense.rows(slice(None))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_signals_refuse_what_is_not_finite(value: float) -> None:
    tokens = torch.tensor([3, 4])
    with pytest.raises(SignalError, match="log-prob of a sampled token"):
        Sampled(tokens, "t", torch.tensor([-1.0, value]))
    with pytest.raises(SignalError, match="top-k log-prob"):
        TopK(tokens, "t", torch.zeros(2, 1, dtype=torch.long), torch.tensor([[-1.0], [value]]))
    with pytest.raises(SignalError, match="a logit"):
        Dense.of(torch.tensor([[0.0, value], [0.0, 0.0]]), tokens).rows(slice(None))


def test_signals_refuse_other_lengths_and_cut_their_graph() -> None:
    tokens = torch.tensor([3, 4])
    with pytest.raises(SignalError, match="has 3 steps, the rollouts have 2"):
        Sampled(tokens, "t", torch.zeros(3))
    logp = torch.zeros(2, requires_grad=True)
    assert not Sampled(tokens, "t", logp * 2).logp_N.requires_grad
