"""A teacher behind a server of completions: what is found out about the server, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from completions import serving
from support import make_tokenizer

from retort import registry
from retort.align.pair import IdMap, SameIds
from retort.align.stops import StopMap
from retort.core.needs import ENTROPY, SAMPLED, Need, can_meet, logp_at
from retort.core.rollouts import Message, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Candidates, TopK, entropy_lower_bound
from retort.errors import SignalError, UserError
from retort.loss.terms import check_needs, check_temperature
from retort.models.endpoint import Endpoint, EndpointModel
from retort.models.load import load_model
from retort.teachers.base import ScoreRequest
from retort.teachers.endpoint import EndpointTeacher
from retort.teachers.view import View
from retort.wire import Client

K = 5
#: What the answer to a request of this kind may be off by rounding.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Iterator[Any]:
    folder = model_folder(seed=2)
    found = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with serving(folder) as found.server:  # type: ignore[attr-defined]
        yield found


def source(lm: Any, offers: str, model: str | None = None) -> Endpoint:
    return Endpoint.at(Client(f"{lm.server.url}/{offers}", patience=0), model, "", same=True)


def opened(lm: Any, offers: str, model: str | None = None) -> EndpointModel:
    return source(lm, offers, model).open(lm.tokenizer, lm.stops)


@pytest.fixture(scope="module")
def some(lm: Any) -> EndpointModel:
    return opened(lm, "max=20,at=16")


def groups(*answers: list[int]) -> Any:
    asked = Prompt("p", (Message("user", "3 + 4 ="),))
    return in_groups(
        [
            Rollout(asked, TokenSequence.of([12, 13]).then(own, decided=True), member=member)
            for member, own in enumerate(answers)
        ]
    )


def teacher(model: EndpointModel, **changed: Any) -> EndpointTeacher:
    alignment = changed.pop("alignment", SameIds(model.width))
    return EndpointTeacher(replace(model, **changed), alignment=alignment, batch_tokens=16)


def plain(lm: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The model's own log-probs at each token of an answer, [A, V]."""
    with torch.no_grad():
        logits_LV = lm.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return logits_LV[len(prompt) - 1 : -1].log_softmax(-1)


# --- what a server offers ---


@pytest.mark.parametrize(
    ("address", "top", "at", "whole", "form"),
    [
        ("max=20,at=16", 20, 16, None, "prompt_logprobs"),
        ("max=5,at=0", 5, 0, None, "prompt_logprobs"),
        ("max=0,at=128", 0, 60, None, "prompt_logprobs"),
        ("max=-1,at=3", 60, 3, 60, "prompt_logprobs"),
        ("max=20,at=0,echo", 20, 0, None, "echo"),
        ("max=20,at=0,echo,texts", 0, 0, None, "echo"),
    ],
)
def test_what_a_server_offers_is_found_by_trying(
    lm: Any, address: str, top: int, at: int, whole: int | None, form: str
) -> None:
    offers = opened(lm, address).server.offers
    assert (offers.top, offers.at, offers.whole, offers.form) == (top, at, whole, form)
    assert offers.model == "tiny"
    assert offers.context == lm.context - 1, "a token more is generated for each"


@pytest.mark.parametrize("address", ["max=20,at=0", "max=20,at=0,echo", "max=0,at=0", "max=20,at=0,echo,texts"])
def test_whatever_the_form_the_written_token_has_its_log_prob(lm: Any, address: str) -> None:
    own = teacher(opened(lm, address))
    said = own.score(groups([12, 13, 2]), ScoreRequest(View(), frozenset({SAMPLED})))
    prompt = own.render(Prompt("p", (Message("user", "3 + 4 ="),))).ids
    expected = plain(lm, prompt, [12, 13, 2]).gather(1, torch.tensor([[12], [13], [2]])).squeeze(1)
    torch.testing.assert_close(said.rows(slice(None)).sampled_logp_N, expected, **CLOSE)


def test_its_tokenizer_is_compared_where_the_server_says(lm: Any) -> None:
    silent = opened(lm, "silent")
    assert any("does not say how it tokenizes" in note for note in silent.notes)
    assert not any("does not say" in note for note in opened(lm, "max=1").notes)
    with pytest.raises(UserError, match=r"its tokenizer is not that of the student.*in server.tokenizer"):
        source(lm, "max=1").open(make_tokenizer(renumbered=3), lm.stops)


def test_a_server_that_is_no_teacher_is_refused(lm: Any) -> None:
    with pytest.raises(UserError, match=r"has no model 'big', but \['tiny'\]"):
        opened(lm, "max=1", "big")
    with pytest.raises(UserError, match="gives no log-probs of the ids that it is sent"):
        opened(lm, "others")
    with pytest.raises(UserError, match="gives no log-probs of the ids that it is sent"):
        opened(lm, "short")


# --- what the teacher then gives ---


def test_a_bound_of_the_entropy_comes_from_the_same_top_k(lm: Any, some: EndpointModel) -> None:
    own = teacher(some)
    needs = frozenset({replace(ENTROPY, or_bound=True), Need("topk", K)})
    said = own.score(groups([12, 13, 2]), ScoreRequest(View(), needs))
    assert isinstance(said, TopK)
    assert not said.entropy_exact
    expected_NV = plain(lm, own.render(Prompt("p", (Message("user", "3 + 4 ="),))).ids, [12, 13, 2])
    torch.testing.assert_close(said.rows(slice(None)).topk(K)[1], expected_NV.topk(K).values, **CLOSE)
    assert torch.equal(said.rows(slice(None)).topk(K)[0], expected_NV.topk(K).indices)
    bound_N = entropy_lower_bound(expected_NV.topk(20).values)
    torch.testing.assert_close(said.rows(slice(None)).entropy_bound_N, bound_N, **CLOSE)


def test_ids_of_the_students_need_no_top_k(lm: Any) -> None:
    own = teacher(opened(lm, "max=0,at=128"))
    ids_NK = torch.tensor([[3, 9, 4], [59, 0, 2], [5, 6, 7]])
    said = own.score(groups([12, 13, 2]), ScoreRequest(View(), frozenset({logp_at(3)}), 1.0, ids_NK))
    assert isinstance(said, Candidates)
    expected_NV = plain(lm, own.render(Prompt("p", (Message("user", "3 + 4 ="),))).ids, [12, 13, 2])
    torch.testing.assert_close(said.logp_NK, expected_NV.gather(1, ids_NK), **CLOSE)


def test_another_stop_and_other_ids_are_read_in_both_directions(lm: Any, some: EndpointModel) -> None:
    """The student's 5 is the teacher's 2 and the other way round; and all ids of the student's are turned round."""
    prompt = teacher(some).render(Prompt("p", (Message("user", "3 + 4 ="),))).ids
    needs, ids_NK = frozenset({logp_at(2), Need("topk", K)}), torch.tensor([[5, 2], [9, 5]])
    swapped = teacher(some, alignment=SameIds(60, StopMap({5: 2, 2: 5})))
    said = swapped.score(groups([12, 5]), ScoreRequest(View(), needs, 1.0, ids_NK)).rows(slice(None), 60)
    expected_NV = plain(lm, prompt, [12, 2])
    torch.testing.assert_close(said.logp_at(ids_NK), expected_NV.gather(1, torch.tensor([[2, 5], [9, 2]])), **CLOSE)
    theirs = expected_NV.topk(K).indices
    assert said.topk(K)[0].tolist() == [[{5: 2, 2: 5}.get(i, i) for i in row] for row in theirs.tolist()]
    turned = teacher(some, alignment=IdMap(torch.arange(60).flip(0), 60))
    said = turned.score(groups([47, 54]), ScoreRequest(View(), needs, 1.0, ids_NK)).rows(slice(None), 60)
    expected_NV = plain(lm, prompt, [12, 5])
    torch.testing.assert_close(said.logp_at(ids_NK), expected_NV.gather(1, 59 - ids_NK), **CLOSE)
    assert said.topk(K)[0].tolist() == (59 - expected_NV.topk(K).indices).tolist()


def test_ids_that_the_student_lacks_leave_a_shorter_list(lm: Any, some: EndpointModel) -> None:
    own = teacher(some, alignment=SameIds(20))
    said = own.score(groups([12, 13]), ScoreRequest(View(), frozenset({Need("topk", 20)})))
    ids_NK, logp_NK = said.rows(slice(None)).topk(20)
    expected_NV = plain(lm, own.render(Prompt("p", (Message("user", "3 + 4 ="),))).ids, [12, 13])
    for ids, logp, row in zip(ids_NK.tolist(), logp_NK.tolist(), expected_NV.topk(20).indices.tolist(), strict=True):
        known = [i for i in row if i < 20]
        assert ids[: len(known)] == known
        assert all(value == -math.inf for value in logp[len(known) :])


# --- what is refused before anything starts ---


def test_what_a_server_lacks_is_refused_with_the_methods_that_it_serves(some: EndpointModel) -> None:
    able = {"teacher": teacher(some).capabilities}
    with pytest.raises(UserError, match=r"'gkd' needs the whole distribution.*logp_at of 16.*topk of 20.*opd, "):
        check_needs(registry.load("gkd"), able)
    with pytest.raises(UserError, match="needs its top-32 from 'teacher'"):
        check_needs(registry.load("eopd", entropy_bound="use", top_k=32), able)
    with pytest.raises(UserError, match="needs log-probs of the student's top-20 from"):
        check_needs(registry.load("vopd"), able)
    check_needs(registry.load("vopd", top_k=16), able)
    check_needs(registry.load("eopd", entropy_bound="use"), able)
    with pytest.raises(UserError, match="needs entropy from 'teacher'.*entropy_bound"):
        check_needs(registry.load("eopd"), able)


def test_a_temperature_takes_the_whole_distribution(lm: Any, some: EndpointModel) -> None:
    able = {"teacher": teacher(some).capabilities}
    check_temperature(registry.load("opd"), able)
    with pytest.raises(UserError, match=r"at temperature 0.7.*set method.temperature=1"):
        check_temperature(registry.load("opd", temperature=0.7), able)
    whole = teacher(opened(lm, "max=-1"))
    check_temperature(registry.load("opd", temperature=0.7), {"teacher": whole.capabilities})
    said = whole.score(groups([12, 13]), ScoreRequest(View(), frozenset({SAMPLED}), 0.7))
    logits = plain(lm, whole.render(Prompt("p", (Message("user", "3 + 4 ="),))).ids, [12, 13]) / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor([[12], [13]])).squeeze(1)
    torch.testing.assert_close(said.rows(slice(None)).sampled_logp_N, expected, **CLOSE)


def test_methods_that_sampled_log_probs_serve_are_listed() -> None:
    found = registry.served_by({"sampled"})
    assert "opd" in found
    assert "eopd" not in found
    assert set(found) < set(registry.served_by({"sampled", Need("topk", 16), "entropy", "temperature"}))


def test_a_limited_k_is_part_of_a_capability() -> None:
    able = {"sampled", Need("topk", 20)}
    assert can_meet(able, Need("topk", 20))
    assert not can_meet(able, Need("topk", 21))
    assert not can_meet(able, ENTROPY)
    assert can_meet({"entropy_bound"}, replace(ENTROPY, or_bound=True))


# --- answers that nothing is learnt from ---


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("short", "it was asked for 1 sequences, and answers 0"),
        ("nan", "as the log-prob of id"),
        ("positive", "gives .*1.5.* as the log-prob of id"),
        ("others", "answers log-probs of other ids"),
    ],
)
def test_answers_that_are_wrong_stop_the_run(lm: Any, some: EndpointModel, fault: str, says: str) -> None:
    server = type(some.server)(Client(f"{lm.server.url}/{fault}", patience=0), some.server.offers)
    with pytest.raises(SignalError, match=says):
        teacher(some, server=server).score(groups([12, 13]), ScoreRequest(View(), frozenset({SAMPLED})))


def test_another_model_behind_the_same_address_is_seen(lm: Any, some: EndpointModel) -> None:
    some.verify(1e-4)
    moved = replace(some, server=type(some.server)(Client(f"{lm.server.url}/moved", patience=0), some.server.offers))
    with pytest.raises(UserError, match=r"has another model than before .* nats apart on average"):
        moved.verify(0.02)
    moved.verify(0.02, moved.probe())
