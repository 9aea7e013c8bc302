"""Several teachers as one distribution: limits that must hold to the bit, and numbers computed in another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from remote import RemoteTeacher
from torch import Tensor

from retort import registry
from retort.align.pair import SameIds
from retort.core.needs import DENSE, DISAGREEMENT, ENTROPY, HIDDEN, SAMPLED, Need, can_meet, logp_at
from retort.core.rollouts import Group, Message, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense, Differing, Sampled, TeacherSignal, TopK, joined
from retort.errors import SignalError, UserError
from retort.loss.terms import check_needs
from retort.models.load import load_model
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.local import LocalTeacher
from retort.teachers.mixture import MixtureTeacher
from retort.teachers.routed import BestTeacher, RoutedTeacher, best_of
from retort.teachers.view import View

VOCAB, K = 61, 5


@dataclass
class Heard:
    """A teacher that remembers which prompts it was asked about."""

    behind: Teacher
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.capabilities = self.behind.name, self.behind.capabilities

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        self.prompts += [group[0].prompt.id for group in groups]
        return self.behind.score(groups, request)


@pytest.fixture(scope="module")
def pair(model_folder: Callable[..., Path]) -> dict[str, Teacher]:
    """Two different teachers, whose vocabularies are padded differently, and whose hidden states differ in width."""
    folders = {"a": model_folder(seed=2, padded_to=80), "b": model_folder(seed=3, padded_to=64, hidden_size=24)}
    found: dict[str, Teacher] = {}
    for name, folder in folders.items():
        lm = load_model(str(folder), role=name, precision="fp32", device=torch.device("cpu"))
        found[name] = LocalTeacher(lm, alignment=SameIds(VOCAB), batch_tokens=16)
    return found


def rollout(lm: Any, asked: str, actions: list[int], member: int = 0, **more: Any) -> Rollout:
    before = lm.tokenizer(asked)["input_ids"]
    prompt = Prompt(asked, (Message("user", asked),), domain=more.pop("domain", ""))
    return Rollout(prompt, TokenSequence.of(before).then(actions, decided=True), member=member, **more)


@pytest.fixture(scope="module")
def groups(pair: dict[str, Teacher]) -> list[Group]:
    lm = pair["a"].lm  # type: ignore[attr-defined]
    return in_groups(
        [
            rollout(lm, "3 + 4 =", [12, 13, 2], 0, domain="a", reward=1.0),
            rollout(lm, "3 + 4 =", [7], 1, domain="a", reward=0.0),
            rollout(lm, "1 =", [20, 30, 11, 9, 2], domain="b", reward=1.0),
            rollout(lm, "2 =", [8, 2], domain="a", reward=1.0),
        ]
    )


def ask(*needs: Need, ids_NK: Tensor | None = None, temperature: float = 1.0) -> ScoreRequest:
    return ScoreRequest(View(), frozenset(needs), temperature, ids_NK)


def logp(teacher: Teacher, groups: list[Group], temperature: float = 1.0) -> Tensor:
    return teacher.score(groups, ask(DENSE, temperature=temperature)).rows(slice(None), VOCAB).logp_NV


def by_domain(prompt: Prompt) -> str:
    return prompt.domain


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("needs", [(DENSE,), (SAMPLED, ENTROPY, Need("topk", K))], ids=["whole", "a few numbers"])
def test_a_weight_of_one_is_the_single_teacher_to_the_bit(
    pair: dict[str, Teacher], groups: list[Group], mean: Any, needs: tuple[Need, ...]
) -> None:
    silent = Heard(pair["b"])
    mixed = MixtureTeacher({"a": pair["a"], "b": silent}, [1, 0], mean=mean).score(groups, ask(*needs))
    alone = pair["a"].score(groups, ask(*needs))
    assert torch.equal(mixed.rows(slice(None)).sampled_logp_N, alone.rows(slice(None)).sampled_logp_N)
    if needs == (DENSE,):
        assert torch.equal(mixed.rows(slice(None)).logp_NV, alone.rows(slice(None)).logp_NV)
    else:
        assert torch.equal(mixed.rows(slice(None)).topk(K)[1], alone.rows(slice(None)).topk(K)[1])
    assert not silent.prompts, "a teacher of weight 0 costs nothing"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_means_are_those_of_probabilities_and_have_mass_one(
    pair: dict[str, Teacher], groups: list[Group], temperature: float
) -> None:
    one, two = (logp(teacher, groups, temperature).double() for teacher in pair.values())
    arithmetic = logp(MixtureTeacher(pair, [1, 3]), groups, temperature)
    torch.testing.assert_close(arithmetic.exp(), (0.25 * one.exp() + 0.75 * two.exp()).float(), rtol=1e-5, atol=1e-7)
    product = logp(MixtureTeacher(pair, [1, 3], mean="geometric"), groups, temperature)
    plain = one.exp() ** 0.25 * two.exp() ** 0.75
    expected = plain / plain.sum(-1, keepdim=True)
    torch.testing.assert_close(product.exp(), expected.float(), rtol=1e-5, atol=1e-7)
    for found in (arithmetic, product):
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_halves_are_symmetric_and_equal_teachers_are_one(
    pair: dict[str, Teacher], groups: list[Group], mean: Any
) -> None:
    turned = dict(reversed(pair.items()))
    assert torch.equal(
        logp(MixtureTeacher(pair, mean=mean), groups), logp(MixtureTeacher(turned, [2, 2], mean=mean), groups)
    )
    same = MixtureTeacher({"a": pair["a"], "again": pair["a"]}, [0.3, 0.7], mean=mean)
    torch.testing.assert_close(logp(same, groups), logp(pair["a"], groups), rtol=1e-5, atol=1e-5)


def test_a_token_that_one_rules_out_stays_possible_in_the_mean_and_not_in_the_product() -> None:
    def says(*p: float) -> Any:
        dense = Dense.of(torch.tensor([p]).log(), torch.tensor([0]))
        return type("Says", (), {"name": "x", "capabilities": frozenset({"dense"}), "score": lambda *_: dense})()

    teachers = {"a": says(1.0, 0.0), "b": says(0.5, 0.5)}
    mean = MixtureTeacher(teachers).score([], ask(DENSE)).rows(slice(None)).logp_NV
    torch.testing.assert_close(mean.exp(), torch.tensor([[0.75, 0.25]]))
    product = MixtureTeacher(teachers, mean="geometric").score([], ask(DENSE)).rows(slice(None)).logp_NV
    assert product.tolist() == [[0.0, -math.inf]]
    against = MixtureTeacher({"a": says(1.0, 0.0), "b": says(0.0, 1.0)}, mean="geometric")
    with pytest.raises(SignalError, match="a logit .or the sum of all. is"):
        against.score([], ask(DENSE)).rows(slice(None))
    apart = MixtureTeacher({"a": says(1.0, 0.0), "b": says(0.0, 1.0)}).score([], ask(DISAGREEMENT))
    torch.testing.assert_close(apart.rows(slice(None)).disagreement_N, torch.tensor([math.log(2)]))


def test_a_mixture_of_servers_is_exact_for_what_they_say_and_a_product_is_refused(
    pair: dict[str, Teacher], groups: list[Group]
) -> None:
    far: dict[str, Teacher] = {name: RemoteTeacher(teacher) for name, teacher in pair.items()}
    mixed, whole = MixtureTeacher(far, [1, 3]), MixtureTeacher(pair, [1, 3])
    assert mixed.capabilities == {"sampled", "logp_at", "temperature"}
    steps, draw = sum(own.steps for group in groups for own in group), torch.Generator().manual_seed(0)
    ids_NK = torch.stack([torch.randperm(VOCAB, generator=draw)[:K] for _ in range(steps)])
    said = mixed.score(groups, ask(SAMPLED, logp_at(K), ids_NK=ids_NK)).rows(slice(None), VOCAB)
    known = whole.score(groups, ask(DENSE)).rows(slice(None), VOCAB)
    torch.testing.assert_close(said.logp_at(ids_NK), known.logp_at(ids_NK), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.sampled_logp_N, known.sampled_logp_N, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="a does not give whole distributions, without which a product cannot"):
        MixtureTeacher(far, mean="geometric")
    lists = TopK(torch.tensor([0]), "x", torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())
    with pytest.raises(SignalError, match="of one kind, not of several .Sampled, TopK"):
        joined([lists, Sampled(torch.tensor([0]), "y", torch.tensor([-1.0]))], torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_are_none_are_refused(pair: dict[str, Teacher], weights: list[float]) -> None:
    with pytest.raises(UserError, match="teachers.weights = .*: give 2 numbers of at least 0"):
        MixtureTeacher(pair, weights)


def test_each_prompt_is_scored_by_its_own_teacher_alone(pair: dict[str, Teacher], groups: list[Group]) -> None:
    heard = {name: Heard(teacher) for name, teacher in pair.items()}
    routed = RoutedTeacher({**heard}, by_domain)
    said = routed.score(groups, ask(DENSE))
    assert {name: one.prompts for name, one in heard.items()} == {"a": ["3 + 4 =", "2 ="], "b": ["1 ="]}
    assert (said.counts["spoke/a"], said.counts["spoke/b"]) == (6, 5)
    one, two = (logp(teacher, groups) for teacher in pair.values())
    expected = torch.cat([one[:4], two[4:9], one[9:]])
    torch.testing.assert_close(said.rows(slice(None)).logp_NV, expected, rtol=1e-5, atol=1e-5)
    some = torch.tensor([9, 5, 0])  # a chunk of several teachers, in another order
    torch.testing.assert_close(said.select(some).rows(slice(None)).logp_NV, expected[some], rtol=1e-5, atol=1e-5)
    few = routed.score(groups, ask(SAMPLED, Need("topk", K))).rows(slice(None))
    torch.testing.assert_close(few.topk(K)[1], expected.topk(K).values, rtol=1e-5, atol=1e-5)
    assert HIDDEN not in routed.capabilities and not can_meet(routed.capabilities, HIDDEN)


def test_one_that_gets_all_prompts_is_that_teacher_to_the_bit(pair: dict[str, Teacher], groups: list[Group]) -> None:
    said = RoutedTeacher(pair, lambda prompt: "b").score(groups, ask(DENSE)).rows(slice(None)).logp_NV
    assert torch.equal(said, logp(pair["b"], groups))
    with pytest.raises(SignalError, match="prompt '3 . 4 =': its teacher 'c' is none of a, b"):
        RoutedTeacher(pair, lambda prompt: "c").score(groups, ask(DENSE))


def test_how_far_they_differ_is_the_jensen_shannon_divergence_whoever_speaks(
    pair: dict[str, Teacher], groups: list[Group]
) -> None:
    one, two = (logp(teacher, groups).double() for teacher in pair.values())
    middle = (0.5 * one.exp() + 0.5 * two.exp()).log()
    expected = 0.5 * (one.exp() * (one - middle)).sum(-1) + 0.5 * (two.exp() * (two - middle)).sum(-1)
    kinds: list[Teacher] = [
        MixtureTeacher(pair, [1, 3]),
        MixtureTeacher(pair, [1, 0], mean="geometric"),
        RoutedTeacher(pair, by_domain),
        BestTeacher(pair),
    ]
    for teacher in kinds:
        said = teacher.score(groups, ask(SAMPLED, DISAGREEMENT))
        assert isinstance(said, Differing) and can_meet(said.offers, DISAGREEMENT)
        torch.testing.assert_close(said.rows(slice(None)).disagreement_N, expected.float(), rtol=1e-4, atol=1e-6)
        without = teacher.score(groups, ask(SAMPLED))
        torch.testing.assert_close(said.rows(slice(None)).sampled_logp_N, without.rows(slice(None)).sampled_logp_N)
        turned = torch.tensor([3, 1])
        part = said.select(turned).rows(slice(0, 1))
        torch.testing.assert_close(part.disagreement_N, expected[turned[:1]].float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(SignalError, match="has no disagreement of several teachers"):
        pair["a"].score(groups, ask(SAMPLED)).rows(slice(None)).disagreement_N  # noqa: B018
    assert expected.max() <= math.log(2)


def test_in_a_mixture_the_share_of_a_teacher_is_its_part_of_what_was_written(
    pair: dict[str, Teacher], groups: list[Group]
) -> None:
    said = MixtureTeacher(pair, [1, 3]).score(groups, ask(DENSE, DISAGREEMENT))
    one, two = (teacher.score(groups, ask(SAMPLED)).rows(slice(None)).sampled_logp_N.exp() for teacher in pair.values())
    share = (0.25 * one / (0.25 * one + 0.75 * two)).sum()
    assert said.counts["spoke/a"] == pytest.approx(float(share), rel=1e-4)
    assert said.counts["spoke/a"] + said.counts["spoke/b"] == pytest.approx(len(one))


def test_the_best_is_whose_log_probs_go_with_the_rewards(pair: dict[str, Teacher], groups: list[Group]) -> None:
    one, two = (teacher.score(groups, ask(SAMPLED)).rows(slice(None)).sampled_logp_N for teacher in pair.values())
    gaps = [float(own[:3].mean() - own[3]) for own in (one, two)]  # right less wrong, of the first prompt
    better = max((0, 1), key=gaps.__getitem__)
    said = BestTeacher(pair).score(groups, ask(SAMPLED))
    expected = torch.cat([(one, two)[better][:4], one[4:]])  # of the others nothing tells: the first
    torch.testing.assert_close(said.rows(slice(None)).sampled_logp_N, expected)
    assert said.counts["undecided"] == 7
    turned = [[replace(own, reward=1.0 - own.reward) for own in group] for group in groups]  # type: ignore[operator]
    worse = BestTeacher(pair).score(turned, ask(SAMPLED)).rows(slice(None)).sampled_logp_N
    torch.testing.assert_close(worse[:4], (one, two)[1 - better][:4])


def test_between_right_and_wrong_the_best_has_the_largest_margin_of_uni_opd(groups: list[Group]) -> None:
    group, valid_TN = groups[0], torch.ones(2, 4, dtype=torch.bool)
    logp_TN = torch.tensor([[-1.0, -1.0, -1.0, -2.0], [-1.0, -2.0, -3.0, -9.0]])  # gaps of 1 and of 7
    assert best_of(group, logp_TN, valid_TN) == 1
    assert best_of(group, logp_TN.flip(0), valid_TN) == 0
    assert best_of(group, logp_TN[:1].expand(2, 4), valid_TN) == 0, "of equals the first"
    ruled_out = torch.tensor([[-math.inf, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    assert best_of(group, ruled_out, valid_TN) == 1
    assert best_of([replace(own, reward=1.0) for own in group], logp_TN, valid_TN) is None
    assert best_of([replace(group[0], reward=None), group[1]], logp_TN, valid_TN) is None
    unread = valid_TN.clone()
    unread[1, 3] = False  # the second rollout has no context: one is left, and nothing to compare
    assert best_of(group, logp_TN, unread) is None


def test_a_method_that_weighs_by_disagreement_is_refused_with_one_teacher(pair: dict[str, Teacher]) -> None:
    from retort.quantities import teacher_disagreement
    from retort.weights import below

    opd = registry.load("opd")
    term = replace(opd.terms[0], weight=below(teacher_disagreement(), 0.1))
    agreed = replace(opd, terms=(term,))
    check_needs(agreed, {"teacher": MixtureTeacher(pair).capabilities})
    with pytest.raises(UserError, match="needs how far several teachers differ from 'teacher'"):
        check_needs(agreed, {"teacher": pair["a"].capabilities})
