"""What any teacher must hold. A new one adds a line to `TEACHERS`.

Tiny models on the CPU; what each says is compared with plain passes of its model, sequence by sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from completions import serving
from flows.linear import model as flow
from flows.paths import rollouts as trajectories
from remote import RemoteTeacher
from served import connected, in_thread
from torch import Tensor

from retort.align.pair import SameIds
from retort.align.spanned import align_spans
from retort.cache.store import Store
from retort.cache.teacher import CachedModel, CachedTeacher, Tally
from retort.core.needs import (
    DENSE,
    DISAGREEMENT,
    ENTROPY,
    GAUSSIAN,
    HIDDEN,
    POLICY,
    SAMPLED,
    SPANS,
    TEMPERATURE,
    Need,
    can_meet,
    logp_at,
)
from retort.core.rollouts import Group, Message, Outcome, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense, Gaussian, SignalRows, TeacherSignal
from retort.errors import SignalError, UserError
from retort.flows.steps import DecidedSteps, step_of
from retort.models.endpoint import Endpoint
from retort.models.load import load_model
from retort.models.offload import InFiles, Room
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.endpoint import EndpointTeacher
from retort.teachers.flow import FlowTeacher
from retort.teachers.itself import OwnWeights, SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.mixture import MixtureTeacher
from retort.teachers.moving import Weights, ema, frozen, live, trust_region
from retort.teachers.routed import BestTeacher, RoutedTeacher
from retort.teachers.served import ServedTeacher
from retort.teachers.spanned import SpanTeacher
from retort.teachers.view import View
from retort.teachers.views import peers, privileged
from retort.wire import Client

#: Ids of the tiny vocabulary that student and teachers share; the model has more.
VOCAB, K = 61, 7


@dataclass(frozen=True)
class Made:
    """A teacher, and how a view says that it is the one to read."""

    teacher: Teacher
    model: str = "teacher"
    weights: Weights | None = None

    def sees(self, view: View) -> View:
        return replace(view, model=self.model, weights=self.weights or frozen())  # type: ignore[arg-type]

    @property
    def of_units(self) -> bool:
        """Whether it has no number for ids that were not written, as a teacher with another tokenizer."""
        return isinstance(self.teacher, SpanTeacher)


def local(lm: Any) -> LocalTeacher:
    return LocalTeacher(lm, alignment=SameIds(VOCAB), batch_tokens=16)


def served(lm: Any) -> ServedTeacher:
    return ServedTeacher(lm.served, alignment=SameIds(VOCAB), batch_tokens=16)


def of_units(lm: Any) -> SpanTeacher:
    """As for another tokenizer, with the same one: every token is a unit, and plain passes say its number."""
    pair = replace(align_spans(lm, lm, "teacher"), width=VOCAB)
    return SpanTeacher(lm, alignment=pair, batch_tokens=16)


def two(lm: Any) -> dict[str, Teacher]:
    return {"a": local(lm), "b": local(lm)}


def by_length(prompt: Prompt) -> str:
    return "a" if len(prompt.text) < 5 else "b"


def itself(weights: Weights) -> Callable[[Any], Made]:
    return lambda lm: Made(SelfTeacher(local(lm), OwnWeights(lm, [weights])), "student", weights)


def endpoint(offers: str) -> Callable[[Any], Made]:
    """A teacher behind a server of completions, which has no more ids than the tokenizer, and these offers."""

    def make(lm: Any) -> Made:
        if offers not in lm.opened:
            source = Endpoint.at(Client(f"{lm.completions.url}/{offers}", patience=0), None, "", same=True)
            lm.opened[offers] = source.open(lm.tokenizer, lm.stops)
        return Made(EndpointTeacher(lm.opened[offers], alignment=SameIds(VOCAB), batch_tokens=16))

    return make


def cached(behind: Any, lm: Any) -> CachedTeacher:
    """With an empty cache, which the first call fills."""
    model = CachedModel.of(Store(Path(tempfile.mkdtemp()), 10**9), lm, Tally())
    whole = behind.with_states(model.states) if isinstance(behind, LocalTeacher) else None
    return CachedTeacher(behind, model, whole)


def offloaded(lm: Any) -> LocalTeacher:
    """The same model, whose weights are in its files between passes."""
    return local(lm.away)


some_ids = endpoint("max=20,at=16")
TEACHERS: dict[str, Callable[[Any], Made]] = {
    "local": lambda lm: Made(local(lm)),
    "offloaded": lambda lm: Made(offloaded(lm)),
    "itself, frozen": itself(frozen()),
    "itself, live": itself(live()),
    "itself, moving": itself(ema(0.5)),
    "itself, trust region": itself(trust_region(0.3)),
    "of units": lambda lm: Made(of_units(lm)),
    "remote": lambda lm: Made(RemoteTeacher(local(lm))),
    "endpoint, all ids": endpoint("max=-1"),
    "endpoint, some ids": some_ids,
    "served": lambda lm: Made(served(lm)),
    "served, of units": lambda lm: Made(of_units(lm.served)),
    # Of equal teachers, so that plain passes of the one model say what they say together.
    "mixture": lambda lm: Made(MixtureTeacher(two(lm), [1, 3])),
    "mixture, remote": lambda lm: Made(MixtureTeacher({"a": RemoteTeacher(local(lm)), "b": local(lm)})),
    "product": lambda lm: Made(MixtureTeacher(two(lm), [1, 3], mean="geometric")),
    "routed": lambda lm: Made(RoutedTeacher(two(lm), by_length)),
    "routed, remote": lambda lm: Made(RoutedTeacher({"a": RemoteTeacher(local(lm)), "b": local(lm)}, by_length)),
    "best": lambda lm: Made(BestTeacher(two(lm))),
    "mixture, offloaded": lambda lm: Made(MixtureTeacher({"a": offloaded(lm), "b": local(lm)})),
    "mixture, served": lambda lm: Made(MixtureTeacher({"a": served(lm), "b": local(lm)})),
    "mixture, endpoint": lambda lm: Made(MixtureTeacher({"a": some_ids(lm).teacher, "b": local(lm)})),
    "routed, endpoint": lambda lm: Made(RoutedTeacher({"a": some_ids(lm).teacher, "b": local(lm)}, by_length)),
    "best, endpoint": lambda lm: Made(BestTeacher({"a": local(lm), "b": some_ids(lm).teacher})),
    "cached": lambda lm: Made(cached(local(lm), lm)),
    "remote, cached": lambda lm: Made(cached(RemoteTeacher(local(lm)), lm)),
    "served, cached": lambda lm: Made(cached(served(lm), lm.served)),
    "mixture, cached": lambda lm: Made(MixtureTeacher({"a": cached(local(lm), lm), "b": local(lm)})),
    "routed, cached": lambda lm: Made(RoutedTeacher({"a": cached(local(lm), lm), "b": local(lm)}, by_length)),
}
#: Writes what was said, and a stop behind what the model said.
TURNS = "{% for one in messages %}{{ one.content }} {% if one.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
#: Of a mixture of two models' logits there are no hidden states, though each has some.
WITHOUT_HIDDEN = ("itself, trust region",)


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = model_folder(seed=2, padded_to=80)
    shared = support.make_narrower(tmp_path_factory.mktemp("shared"), folder, VOCAB)
    found = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    away = found.away = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))  # type: ignore[attr-defined]
    away.offload.begin(away.model, [away.head().weight_VD], "disk", partial(InFiles, "teacher", str(folder)), Room())
    found.opened = {}  # type: ignore[attr-defined]
    with in_thread(found) as url, serving(shared) as found.completions:  # type: ignore[attr-defined]
        found.served = connected(url, found)
        found.model.requires_grad_()  # as a student that teaches itself
        yield found


@pytest.fixture(params=TEACHERS)
def made(request: pytest.FixtureRequest, lm: Any) -> Made:
    return TEACHERS[request.param](lm)


def rollout(lm: Any, asked: str, actions: list[int], member: int = 0, **more: Any) -> Rollout:
    """An answer to a prompt that has its text for an id."""
    before = lm.tokenizer(asked)["input_ids"]
    privileged = {"solution": more.pop("solution")} if "solution" in more else {}
    prompt = Prompt(asked, (Message("user", asked),), privileged=privileged)
    return Rollout(prompt, TokenSequence.of(before).then(actions, decided=True), member=member, **more)


def batch(lm: Any) -> list[Group]:
    """Ragged answers to two prompts, in an order of their own."""
    return in_groups(
        [
            rollout(lm, "3 + 4 =", [12, 13, 2], 1),
            rollout(lm, "3 + 4 =", [7], 0),
            rollout(lm, "1 =", [20, 30, 11, 9, 2]),
        ]
    )


def given(groups: list[Group]) -> Tensor:
    """Ids that somebody asks about, other ones at every step and in no order of the teacher's."""
    steps = len(written(groups))
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCAB, generator=draw)[:K] for _ in range(steps)])


def ask(
    made: Made, *needs: Need, groups: list[Group], view: View | None = None, temperature: float = 1.0
) -> ScoreRequest:
    """As `answers` would ask: who has the whole distribution is given no ids."""
    wanted = any(need.kind == "logp_at" for need in needs) and not can_meet(made.teacher.capabilities, DENSE)
    return ScoreRequest(made.sees(view or View()), frozenset(needs), temperature, given(groups) if wanted else None)


def able(made: Made) -> list[Need]:
    """All that the teacher says it can be asked for."""
    kinds = (SAMPLED, ENTROPY, Need("entropy_bound"), Need("topk", K), logp_at(K), DENSE, HIDDEN, SPANS, DISAGREEMENT)
    return [need for need in kinds if can_meet(made.teacher.capabilities, need)]


def least(made: Made) -> tuple[Need, ...]:
    """What every teacher can be asked for."""
    found = (SAMPLED, SPANS if made.of_units else logp_at(K))
    assert set(found) <= set(able(made)), "the comparisons below need both"
    return found


def plain(lm: Any, groups: list[Group], temperature: float = 1.0) -> Tensor:
    """The model's own log-probs over the shared ids before each token written, [N, V], nats."""
    found: list[Tensor] = []
    for item in (own for group in groups for own in group):
        with torch.no_grad():
            logits_LV = lm.model(input_ids=item.sequence.tokens_L[None]).logits[0, :, :VOCAB]
        found.append(logits_LV[item.sequence.action_mask_L.nonzero().squeeze(-1) - 1])
    return (torch.cat(found) / temperature).log_softmax(-1)


def written(groups: list[Group]) -> Tensor:
    return Pack.of([own for group in groups for own in group]).steps.tokens_N


def numbers(made: Made, found: SignalRows, groups: list[Group]) -> list[Tensor]:
    """What it says of the tokens written, and of ids that it was given."""
    return [found.sampled_logp_N, *([] if made.of_units else [found.logp_at(given(groups))])]


def of_plain(made: Made, expected_NV: Tensor, groups: list[Group]) -> list[Tensor]:
    """The same by plain passes."""
    own_N = expected_NV.gather(1, written(groups)[:, None]).squeeze(1)
    return [own_N, *([] if made.of_units else [expected_NV.gather(1, given(groups))])]


def rows(signal: TeacherSignal) -> SignalRows:
    return signal.rows(slice(None), VOCAB)


def test_it_is_about_the_tokens_written_in_the_order_of_the_groups(made: Made, lm: Any) -> None:
    groups = batch(lm)
    said = made.teacher.score(groups, ask(made, *least(made), groups=groups))
    said.check_tokens(written(groups))
    expected_NV = plain(lm, groups)
    tokens_N1 = written(groups)[:, None]
    torch.testing.assert_close(
        rows(said).sampled_logp_N, expected_NV.gather(1, tokens_N1).squeeze(1), rtol=1e-4, atol=1e-5
    )
    turned = groups[::-1]
    again = made.teacher.score(turned, ask(made, *least(made), groups=turned))
    again.check_tokens(written(turned))
    torch.testing.assert_close(rows(again).sampled_logp_N[:5], rows(said).sampled_logp_N[4:])


def test_its_capabilities_are_what_it_then_gives(made: Made, lm: Any, request: pytest.FixtureRequest) -> None:
    groups = batch(lm)
    expected_NV = plain(lm, groups)
    expected_N = expected_NV.gather(1, written(groups)[:, None]).squeeze(1)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    for need in able(made):
        if need == HIDDEN and request.node.callspec.params["made"] in WITHOUT_HIDDEN:
            continue
        asked = ask(made, need, groups=groups)
        said = made.teacher.score(groups, asked)
        assert can_meet(said.offers, need), need
        if need == SAMPLED:
            torch.testing.assert_close(rows(said).sampled_logp_N, expected_N, **close)
        if need == ENTROPY:
            torch.testing.assert_close(rows(said).entropy_N, -(expected_NV.exp() * expected_NV).sum(-1), **close)
        if need.kind == "entropy_bound":
            exact_N = -(expected_NV.exp() * expected_NV).sum(-1)
            assert bool((rows(said).entropy_bound_N < exact_N).all())
            assert bool((rows(said).entropy_bound_N > 0.5 * exact_N).all())
            with pytest.raises(SignalError, match="has no exact entropy"):
                _ = rows(said).entropy_N
        if need.kind == "topk":
            torch.testing.assert_close(rows(said).topk(K)[1], expected_NV.topk(K).values, **close)
        if need == DENSE:
            torch.testing.assert_close(rows(said).logp_NV, expected_NV, **close)
        if need == DISAGREEMENT:
            torch.testing.assert_close(rows(said).disagreement_N, torch.zeros(len(expected_N)), **close)
        if need == SPANS:
            torch.testing.assert_close(rows(said).units.logp_F, expected_N, **close)
            torch.testing.assert_close(rows(said).units.teacher.logp_CV, expected_NV, **close)
        if need == HIDDEN:
            states_ND = said.hidden_states()
            torch.testing.assert_close(lm.head().logits(states_ND, VOCAB).log_softmax(-1), expected_NV, **close)


def test_it_speaks_of_exactly_the_ids_it_is_given(made: Made, lm: Any) -> None:
    """Given to those that have the whole distribution, too: then they need not keep it."""
    groups = batch(lm)
    ids_NK = given(groups)
    said = made.teacher.score(groups, ScoreRequest(made.sees(View()), frozenset(least(made)), 1.0, ids_NK))
    if made.of_units:
        assert not can_meet(said.offers, logp_at(K))
        return
    assert not isinstance(said, Dense)
    found = rows(said)
    asked_NK = found.candidates(K)
    assert asked_NK is not None
    assert torch.equal(asked_NK, ids_NK)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    expected_NK = plain(lm, groups).gather(1, ids_NK)
    torch.testing.assert_close(found.logp_at(ids_NK), expected_NK, **close)
    inside_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    left_N = torch.log1p(-expected_NK.exp().sum(-1))
    torch.testing.assert_close(found.logp_outside(ids_NK, inside_NK), left_N, **close)


def test_the_temperature_is_that_of_its_distributions(made: Made, lm: Any) -> None:
    groups = batch(lm)
    if not can_meet(made.teacher.capabilities, TEMPERATURE):
        with pytest.raises(SignalError, match="gives no whole distribution"):
            made.teacher.score(groups, ask(made, *least(made), groups=groups, temperature=2.0))
        return
    warm = made.teacher.score(groups, ask(made, *least(made), groups=groups, temperature=2.0))
    expected = of_plain(made, plain(lm, groups, 2.0), groups)
    for found, other in zip(numbers(made, rows(warm), groups), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def test_steps_without_context_are_marked_and_change_nothing_else(made: Made, lm: Any) -> None:
    view = privileged("solution")
    known = rollout(lm, "3 + 4 =", [12, 13], solution="4 + 3 = 7")
    groups = in_groups([rollout(lm, "1 =", [7, 8, 9]), known])
    said = made.teacher.score(groups, ask(made, *least(made), groups=groups, view=view))
    assert said.valid_N is not None
    assert said.valid_N.tolist() == [False] * 3 + [True] * 2
    assert said.counts["no_context"] == 1
    alone = in_groups([known])
    own = made.teacher.score(alone, ask(made, *least(made), groups=alone, view=view))
    assert own.valid_N is None or bool(own.valid_N.all())
    torch.testing.assert_close(rows(said).sampled_logp_N[3:], rows(own).sampled_logp_N)


def test_a_view_may_look_at_the_others_of_a_group_and_at_no_other_group(made: Made, lm: Any) -> None:
    right = rollout(lm, "3 + 4 =", [12, 2], 0, reward=1.0, text="7")
    other = rollout(lm, "3 + 4 =", [20, 2], 1, reward=0.0, text="15")
    alone = rollout(lm, "1 =", [12, 2], 0, reward=0.0, text="7")
    groups = in_groups([right, other, alone])
    said = made.teacher.score(groups, ask(made, *least(made), groups=groups, view=peers(feedback="never")))
    assert said.valid_N is not None
    assert said.valid_N.tolist() == [False, False, True, True, False, False], "only the second has a right sibling"


def test_nothing_that_learns_is_in_what_it_says_and_nothing_is_changed(made: Made, lm: Any) -> None:
    groups = batch(lm)
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    first, second = (rows(made.teacher.score(groups, ask(made, *least(made), groups=groups))) for _ in range(2))
    for found, again in zip(numbers(made, first, groups), numbers(made, second, groups), strict=True):
        assert not found.requires_grad
        assert torch.equal(found, again)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_what_stands_between_decided_tokens_is_read(made: Made, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns: what an environment said in between is context, as it was for the student.

    A teacher of units renders the messages, of which this template makes the very ids that the student read.
    """
    for one in (lm, lm.served, lm.away):
        monkeypatch.setattr(one.tokenizer, "chat_template", TURNS)
    sequence = TokenSequence.of(lm.tokenizer("3 + 4 =")["input_ids"]).then([12, 13, 2], decided=True)
    sequence = sequence.then([30, 31]).then([20, 2], decided=True).then([32, 33]).then([11, 2], decided=True)
    replies = tuple(Outcome((Message("user", lm.tokenizer.decode(ids)),)) for ids in ([30, 31], [32, 33]))
    groups = in_groups([Rollout(Prompt("p", (Message("user", "3 + 4 ="),)), sequence, outcomes=replies)])
    said = made.teacher.score(groups, ask(made, *least(made), groups=groups))
    said.check_tokens(torch.tensor([12, 13, 2, 20, 2, 11, 2]))
    expected = of_plain(made, plain(lm, groups), groups)
    for found, other in zip(numbers(made, rows(said), groups), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def of_latents() -> FlowTeacher:
    return FlowTeacher(flow(seed=3), batch=5)


#: Teachers of denoising steps, all with the same model: there a step decides a latent, and nothing is said of ids.
LATENT_TEACHERS: dict[str, Callable[[], Teacher]] = {
    "flow": of_latents,
    "routed flows": lambda: RoutedTeacher({"a": of_latents(), "b": of_latents()}, by_length),
}


@pytest.mark.parametrize("name", LATENT_TEACHERS)
def test_of_latents_it_is_about_the_latents_decided_in_the_order_of_the_groups(name: str) -> None:
    groups = in_groups(trajectories())
    for own in (groups, groups[::-1]):
        said = LATENT_TEACHERS[name]().score(own, ScoreRequest(View(), frozenset({GAUSSIAN})))
        said.check_tokens(written(own))
        assert isinstance(said, Gaussian)
        steps = DecidedSteps.of_rollouts([one for group in own for one in group])
        said.check_decided(steps.decided_ND)
        expected = step_of(flow(seed=3), steps)
        torch.testing.assert_close(said.mean_ND, expected.mean.flatten(1).detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(said.std_N, expected.std_N)


@pytest.mark.parametrize("name", LATENT_TEACHERS)
def test_of_latents_its_capabilities_are_what_it_then_gives(name: str) -> None:
    teacher, groups = LATENT_TEACHERS[name](), in_groups(trajectories())
    kinds = (SAMPLED, GAUSSIAN, POLICY, DENSE, ENTROPY, Need("topk", K), logp_at(K), HIDDEN, SPANS, DISAGREEMENT)
    said = [need for need in kinds if can_meet(teacher.capabilities, need)]
    assert said == [SAMPLED, GAUSSIAN, POLICY], "and POLICY is DENSE to whoever compares needs"
    for need in said:
        assert can_meet(teacher.score(groups, ScoreRequest(View(), frozenset({need}))).offers, need)


@pytest.mark.parametrize("name", LATENT_TEACHERS)
def test_of_latents_nothing_that_learns_is_in_what_it_says_and_no_other_prompt_is_read(name: str) -> None:
    teacher, groups = LATENT_TEACHERS[name](), in_groups(trajectories())
    first, second = (teacher.score(groups, ScoreRequest(View(), frozenset({SAMPLED}))) for _ in range(2))
    found, again = (one.rows(slice(None)).sampled_logp_N for one in (first, second))
    assert not found.requires_grad
    assert torch.equal(found, again)
    with pytest.raises(UserError, match="a flow model reads the student's own prompt"):
        teacher.score(groups, ScoreRequest(privileged("solution", model="teacher"), frozenset({SAMPLED})))
