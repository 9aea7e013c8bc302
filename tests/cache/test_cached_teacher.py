"""A teacher with a cache gives what the teacher gives, to the last bit, and asks it only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from remote import RemoteTeacher
from torch import Tensor

from retort.align.pair import IdMap, SameIds
from retort.align.spanned import align_spans
from retort.align.stops import StopMap
from retort.cache.entries import entries_of, signal_of
from retort.cache.store import Store
from retort.cache.teacher import CachedModel, CachedTeacher, Tally
from retort.core.needs import DENSE, ENTROPY, HIDDEN, SAMPLED, SPANS, Need, logp_at
from retort.core.rollouts import Group, Message, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Candidates, Sampled, Spans, TeacherSignal, TopK
from retort.errors import SignalError, UserError
from retort.models.fingerprint import digests_of, fingerprint_of
from retort.models.load import load_model
from retort.models.stored import load_stored
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher
from retort.teachers.view import View
from retort.teachers.views import peers, privileged

VOCAB, K, LARGE = 61, 5, 10**9
NEEDS: dict[str, frozenset[Need]] = {
    "sampled": frozenset({SAMPLED}),
    "entropy": frozenset({SAMPLED, ENTROPY}),
    "top-k": frozenset({SAMPLED, Need("topk", K)}),
    "top-k and entropy": frozenset({Need("topk", K), ENTROPY}),
    "whole": frozenset({DENSE}),
    "hidden states": frozenset({HIDDEN}),
    "log-probs of ids": frozenset({logp_at(K)}),
}


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    return loaded(model_folder(seed=2, padded_to=80))


def loaded(folder: Path, **more: Any) -> Any:
    settings = {"role": "teacher", "precision": "fp32", "device": torch.device("cpu"), **more}
    return load_model(str(folder), **settings)


def rollout(asked: str, actions: list[int], member: int = 0, **more: Any) -> Rollout:
    given = {"solution": more.pop("solution")} if "solution" in more else {}
    prompt = Prompt(asked, (Message("user", asked),), privileged=given)
    return Rollout(prompt, TokenSequence.of([5, 6, 7]).then(actions, decided=True), member=member, **more)


def batch() -> list[Group]:
    return in_groups(
        [
            rollout("3 + 4 =", [12, 13, 2], 1),
            rollout("3 + 4 =", [7], 0),
            rollout("1 =", [20, 30, 11, 9, 2]),
            rollout("9 - 2 =", [21, 2]),
        ]
    )


def local(lm: Any) -> LocalTeacher:
    return LocalTeacher(lm, alignment=SameIds(VOCAB), batch_tokens=16)


def cached(behind: Any, folder: Path, lm: Any) -> CachedTeacher:
    model = CachedModel.of(Store(folder, LARGE), lm, Tally())
    return CachedTeacher(behind, model, behind.with_states(model.states) if isinstance(behind, LocalTeacher) else None)


def request(name: str, view: View | None = None, **more: Any) -> ScoreRequest:
    return ScoreRequest(view or View(), NEEDS[name], **more)


def tensors(signal: TeacherSignal) -> dict[str, Tensor]:
    """All that a signal holds, by name."""
    found = {name: own for name, own in vars(signal).items() if isinstance(own, Tensor)}
    if signal.valid_N is not None:
        kept_N = signal.valid_N.cpu()
        found = {name: own if name == "valid_N" else own[kept_N] for name, own in found.items()}
    top = getattr(signal, "top", None)
    found |= {} if top is None else {f"top {name}": own for name, own in tensors(top).items()}
    if {"dense", "spans"} & signal.offers:
        rows = signal.rows(slice(None))
        found |= {"distribution": rows.logp_NV} if "dense" in signal.offers else {"units": rows.units.logp_F}
    return found | ({"states": signal.hidden_states()} if "hidden" in signal.offers else {})


def check_same(found: TeacherSignal, expected: TeacherSignal) -> None:
    """To the last bit, where it is valid."""
    assert type(found) is type(expected)
    assert (found.offers, found.source, dict(found.counts)) == (expected.offers, expected.source, dict(expected.counts))
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(mine[name], values), name


def never(sequences: Sequence[TokenSequence], budget: int) -> Tensor:
    assert not sequences, f"the model was asked about {len(sequences)} sequences"
    return torch.zeros(0, 16)


@pytest.mark.parametrize("name", NEEDS)
def test_what_was_stored_is_what_was_computed_to_the_last_bit(
    name: str, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = batch()
    expected = local(lm).score(groups, request(name))
    check_same(cached(local(lm), tmp_path, lm).score(groups, request(name)), expected)
    monkeypatch.setattr(lm, "all_hidden", never)
    again = cached(local(lm), tmp_path, lm)
    check_same(again.score(groups, request(name)), expected)
    assert again.model.tally.take() == (4, 4)
    turned = groups[::-1]  # other batches, another order
    part = again.score(turned[:2], request(name))
    own = expected.select(torch.tensor([9, 10, 4, 5, 6, 7, 8]))
    assert torch.equal(part.rows(slice(None)).sampled_logp_N, own.rows(slice(None)).sampled_logp_N)


def given(groups: list[Group], seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    steps = sum(own.steps for group in groups for own in group)
    return torch.stack([torch.randperm(VOCAB, generator=draw)[:K] for _ in range(steps)])


@pytest.mark.parametrize("more", [frozenset[Need](), frozenset({Need("topk", 3), ENTROPY})])
def test_log_probs_of_ids_that_the_student_chose(
    more: frozenset[Need], lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever cannot hand over a whole distribution is given ids: they belong to the key."""
    groups = batch()
    asked = ScoreRequest(View(), frozenset({logp_at(K), SAMPLED}) | more, 1.0, given(groups))
    behind = RemoteTeacher(local(lm)) if not more else local(lm)
    expected = behind.score(groups, asked)
    assert isinstance(expected, Candidates)
    check_same(cached(behind, tmp_path, lm).score(groups, asked), expected)
    other = replace(asked, student_ids_NK=given(groups, seed=1))
    again = cached(behind, tmp_path, lm)
    check_same(again.score(groups, other), behind.score(groups, other))
    assert again.model.tally.take() == (4, 0), "other ids are another question"
    mixed_NK = given(groups)
    mixed_NK[-1] = torch.arange(K)
    found = again.score(groups, replace(asked, student_ids_NK=mixed_NK))
    found.check_tokens(expected.tokens_N)
    assert isinstance(found, Candidates)
    found.check_ids(mixed_NK)
    assert again.model.tally.take() == (4, 3)
    monkeypatch.setattr(lm, "all_hidden", never)
    check_same(cached(behind, tmp_path, lm).score(groups, asked), expected)


@pytest.mark.parametrize("name", ["sampled", "top-k and entropy", "whole"])
def test_only_what_is_not_stored_is_computed(name: str, lm: Any, tmp_path: Path) -> None:
    groups = batch()
    cached(local(lm), tmp_path, lm).score(groups[:1], request(name))
    again = cached(local(lm), tmp_path, lm)
    found = again.score(groups, request(name))
    assert again.model.tally.take() == (4, 2)
    expected = local(lm).score(groups, request(name))
    found.check_tokens(expected.tokens_N)
    torch.testing.assert_close(
        found.rows(slice(None)).sampled_logp_N, expected.rows(slice(None)).sampled_logp_N, rtol=1e-5, atol=1e-6
    )
    assert again.score(groups, request(name)).steps == expected.steps
    assert again.model.tally.take() == (4, 4)


def test_units_of_a_teacher_with_another_tokenizer(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, asked = batch(), ScoreRequest(View(), frozenset({SPANS}))
    pair = replace(align_spans(lm, lm, "teacher"), width=VOCAB)
    behind = SpanTeacher(lm, alignment=pair, batch_tokens=16)
    expected = behind.score(groups, asked)
    model = CachedModel.of(Store(tmp_path, LARGE), lm, Tally())
    check_same(behind.with_states(model.states).score(groups, asked), expected)
    monkeypatch.setattr(lm, "all_hidden", never)
    found = behind.with_states(model.states).score(groups, asked)
    assert isinstance(found, Spans)
    check_same(found, expected)
    assert model.tally.take() == (8, 4)


@pytest.mark.parametrize("name", ["sampled", "top-k", "whole"])
def test_a_view_without_context_and_one_of_siblings(
    name: str, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rollout("3 + 4 =", [12, 2], 0, reward=1.0, text="7", solution="so 7")
    other = rollout("3 + 4 =", [20, 2], 1, reward=0.0, text="15", solution="so 7")
    groups = in_groups([right, other, rollout("1 =", [12, 2, 9], 0, reward=0.0, text="7")])
    views = [privileged("solution"), peers(feedback="never")]
    expected = [local(lm).score(groups, request(name, view)) for view in views]
    assert [int(own.valid_N.sum()) for own in expected if own.valid_N is not None] == [4, 2]
    for view, own in zip(views, expected, strict=True):
        check_same(cached(local(lm), tmp_path, lm).score(groups, request(name, view)), own)
    nothing = in_groups([rollout("1 =", [12, 2, 9])])  # nobody has anything to show
    for _ in range(2):
        valid_N = cached(local(lm), tmp_path, lm).score(nothing, request(name, views[0])).valid_N
        assert valid_N is not None
        assert not bool(valid_N.any())
    monkeypatch.setattr(lm, "all_hidden", never)
    for view, own in zip(views, expected, strict=True):
        check_same(cached(local(lm), tmp_path, lm).score(groups, request(name, view)), own)
    changed = in_groups([replace(right, text="8"), other])
    with pytest.raises(AssertionError, match="asked about"):  # what a sibling shows is part of what is read
        cached(local(lm), tmp_path, lm).score(changed, request(name, views[1]))


def test_another_temperature_need_or_alignment_is_another_score(lm: Any, tmp_path: Path) -> None:
    groups, stops = batch(), StopMap(merged=(7,), into=2)
    asked = [
        (SameIds(VOCAB), request("sampled")),
        (SameIds(VOCAB), request("sampled", temperature=2.0)),
        (SameIds(VOCAB), request("entropy")),
        (SameIds(VOCAB - 1), request("sampled")),
        (SameIds(VOCAB, stops), request("sampled")),
        (IdMap(torch.arange(VOCAB), VOCAB), request("sampled")),
    ]
    for alignment, one in asked:
        behind = LocalTeacher(lm, alignment=alignment, batch_tokens=16)
        teacher = cached(behind, tmp_path, lm)
        check_same(teacher.score(groups, one), behind.score(groups, one))
        assert teacher.model.tally.take() == (4, 0)


def test_hidden_states_serve_every_temperature_and_vocabulary(
    lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = batch()
    cached(local(lm), tmp_path, lm).score(groups, request("whole"))
    behind = LocalTeacher(lm, alignment=SameIds(40), batch_tokens=16)
    expected = behind.score(groups, request("whole", temperature=0.7))
    monkeypatch.setattr(lm, "all_hidden", never)
    check_same(cached(behind, tmp_path, lm).score(groups, request("whole", temperature=0.7)), expected)


def test_other_weights_or_settings_are_another_model(
    lm: Any, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    cached(local(lm), tmp_path, lm).score(batch(), request("sampled"))
    same = loaded(model_folder(seed=2, padded_to=80))
    assert fingerprint_of(same, digests_of(same)) == fingerprint_of(lm, digests_of(lm))
    with torch.no_grad():
        next(iter(same.model.parameters()))[3, 1] += 1e-6  # one number of one tensor
    moved = cached(local(same), tmp_path, same)
    moved.score(batch(), request("sampled"))
    assert moved.model.tally.take() == (4, 0)
    others = [
        loaded(model_folder(seed=2, padded_to=80), precision="bf16"),
        loaded(model_folder(seed=2, padded_to=80), attention="eager"),
        loaded(model_folder(seed=2, padded_to=80, rms_norm_eps=1e-3)),
    ]
    known = [fingerprint_of(own, digests_of(own)) for own in (lm, same, *others)]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_not_loaded_gives_what_is_stored(
    tied: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    original = loaded(model_folder(seed=3, padded_to=80, tie_word_embeddings=tied, chat=True))
    groups = batch()
    first = cached(local(original), tmp_path, original)
    expected = {name: first.score(groups, request(name)) for name in NEEDS}
    folder = first.model.store.model(original.name)
    assert folder is not None
    absent = load_stored(folder, "gone", "teacher", torch.device("cpu"), trust_remote_code=False)
    assert (absent.digest(), digests_of(absent)) == (original.digest(), digests_of(original))
    assert (absent.stops, absent.rows, absent.context) == (original.stops, original.rows, original.context)
    assert absent.parameters == original.parameters
    model = CachedModel.of(Store(tmp_path, LARGE), absent, Tally())
    behind = local(absent).with_states(model.states)
    for name, known in expected.items():
        found = CachedTeacher(behind, model, behind).score(groups, request(name))
        check_same(replace(found, source=known.source), known)
        with pytest.raises(UserError, match="gone is not loaded .* 1 of the completions .* `retort score") as caught:
            CachedTeacher(behind, model, behind).score(in_groups([rollout("8 =", [9, 2])]), request(name))
        assert "\n" not in str(caught.value)


def test_several_models_of_one_name_are_refused(lm: Any, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    assert store.model(lm.name) is None
    for own in (lm, loaded(model_folder(seed=5))):
        own.name = "twice"
        known = digests_of(own)
        store.keep_model(own, known, fingerprint_of(own, known))
    with pytest.raises(UserError, match="2 different models that were all called twice"):
        store.model("twice")
    assert Store(tmp_path, 10).model("other") is None


def test_a_signal_of_another_kind_is_refused(lm: Any) -> None:
    whole = local(lm).score(batch(), request("whole"))
    with pytest.raises(SignalError, match="a signal of kind Dense cannot be cached"):
        entries_of(whole, [11])


def test_signals_of_a_server_keep_their_flags() -> None:
    tokens_N = torch.tensor([3, 4, 5])
    ids_NK, logp_NK = torch.tensor([[3, 1], [4, 1], [5, 1]]), torch.full((3, 2), -1.0)
    top = TopK(tokens_N, "s", ids_NK, logp_NK, None, torch.ones(3), entropy_exact=False, whole=True)
    signals: list[TeacherSignal] = [
        top,
        Sampled(tokens_N, "s", torch.full((3,), -2.0)),
        Candidates(tokens_N, "s", ids_NK, logp_NK, None, top),
        Candidates(tokens_N, "s", ids_NK, logp_NK),
    ]
    for signal in signals:
        found = signal_of(entries_of(signal, [1, 2]), list(tokens_N.split([1, 2])), "s", {})
        check_same(found, signal)
        flags = found if isinstance(found, TopK) else getattr(found, "top", None)
        assert flags is None or (flags.whole, flags.entropy_exact) == (True, False)
