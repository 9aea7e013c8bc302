"""Several teachers: weights by confidence, teachers without a context, steps of episodes, and what the paper proves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Toy

from retort import registry
from retort.core.signals import Dense
from retort.divergences import jsd_values
from retort.errors import UserError
from retort.functional import token_losses
from retort.teachers import debate_weights


def logits(*shares: float) -> Tensor:
    """Logits of a distribution over ids, fp64, the same for one token."""
    return torch.tensor([shares], dtype=torch.float64).log()


def losses(toy: Toy, name: str, views: dict[str, Any] | None = None, **more: Any) -> Any:
    settings = more.pop("settings", {})
    method = registry.load(name, **settings)
    said = {view: toy.view(view)[0] @ toy.view(view)[1].T for view in method.views} | (views or {})
    given = {"tokens": toy.tokens, "rollouts": toy.rollouts, "turns": toy.turns} | more
    teacher = said.pop("teacher")
    return token_losses(method, student_logits=toy.logits, teacher_logits=teacher, extra_views=said, **given)


def without(toy: Toy, view: str, steps: Tensor) -> Dense:
    """What a view says, without a context at some steps."""
    hidden, head = toy.view(view)
    return replace(Dense.of(hidden @ head.T, toy.tokens), valid_N=~steps)


def test_weights_of_the_papers_case_and_what_they_depend_on() -> None:
    assert debate_weights([95, 90]) == pytest.approx([0.5125, 0.4875], abs=1e-4)
    assert debate_weights([90, 70]) == pytest.approx([0.550, 0.450], abs=1e-3)
    assert debate_weights([0, 100])[1] == pytest.approx(0.731, abs=1e-3)
    assert debate_weights([25, 20]) == pytest.approx(debate_weights([95, 90]), abs=1e-12)
    assert debate_weights([47.5, 45]) != pytest.approx(debate_weights([95, 90]), abs=1e-3)
    assert debate_weights([95, 90], temperature=0.1)[0] > 0.6
    assert sum(debate_weights([3, 50, 99])) == pytest.approx(1.0, abs=1e-12)
    assert debate_weights([50, 50, 50]) == pytest.approx([1 / 3] * 3)


def test_one_missing_tag_makes_all_weights_equal() -> None:
    assert debate_weights([99, None]) == [0.5, 0.5]
    assert debate_weights([99, None, 1]) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("confidences", "temperature", "message"),
    [
        ([], 1.0, "no confidence"),
        ([float("nan"), 1.0], 1.0, "not finite"),
        ([1.0, 2.0], 0.0, "must be positive"),
    ],
)
def test_weights_that_cannot_be(confidences: list[float | None], temperature: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        debate_weights(confidences, temperature)


def test_the_loss_is_the_weighted_sum_of_both_teachers_mean_over_each_rollout() -> None:
    toy = Toy()
    confidences = [[95, 90], [10, 80], [None, 50], [0, 0], [100, 0]]
    found = losses(toy, "mad_opd", confidences=confidences)
    student = toy.logits.log_softmax(-1)
    own = {
        view: jsd_values((toy.view(view)[0] @ toy.view(view)[1].T).log_softmax(-1), student, 0.5)
        for view in ("teacher", "teacher_2")
    }
    expected = torch.zeros((), dtype=torch.float64)
    for rollout, sure in enumerate(confidences):
        one, two = debate_weights(sure)
        here = toy.rollouts == rollout
        expected = expected + (one * own["teacher"][here].mean() + two * own["teacher_2"][here].mean()) / 5
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)


def test_confidences_of_all_rollouts_and_of_each_and_as_a_tensor_are_the_same() -> None:
    toy = Toy()
    each = losses(toy, "mad_opd", confidences=[[95, 90]] * 5).loss
    for given in ([95, 90], torch.tensor([95.0, 90.0]), torch.tensor([[95.0, 90.0]] * 5)):
        torch.testing.assert_close(losses(toy, "mad_opd", confidences=given).loss, each)
    none = losses(toy, "mad_opd").loss
    for given in ([95, None], torch.tensor([math.nan, 3.0]), [7, 7]):
        torch.testing.assert_close(losses(toy, "mad_opd", confidences=given).loss, none)
    assert not torch.isclose(each, none)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[95, 90]] * 4, "one for each teacher"),
        ([1, 2, 3], "confidences are of 3 teachers"),
        (["sure", "unsure"], "must be numbers"),
        ([[1, 2], [3], [1, 2], [1, 2], [1, 2]], "must be numbers"),
    ],
)
def test_confidences_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        losses(Toy(), "mad_opd", confidences=given)


def test_a_teacher_without_a_context_leaves_its_weight_to_the_other_and_a_rollout_without_any_is_skipped() -> None:
    toy = Toy()
    first, last = toy.rollouts == 0, toy.rollouts == 4
    views = {"teacher": without(toy, "teacher", first | last), "teacher_2": without(toy, "teacher_2", last)}
    found = losses(toy, "mad_opd", views, confidences=[95, 90])
    whole = losses(toy, "mad_opd", confidences=[95, 90])
    one, two = (whole.terms[view].value for view in ("teacher", "teacher_2"))
    expected = two[first].mean() / 4  # all the weight of the first rollout
    for rollout in (1, 2, 3):
        here = toy.rollouts == rollout
        expected = expected + (0.5124974 * one[here].mean() + 0.4875026 * two[here].mean()) / 4
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-9)
    assert not bool(found.terms["teacher_2"].counted[last].any())


def test_a_teacher_that_reads_less_changes_nothing_of_the_other() -> None:
    toy = Toy()
    half = (toy.rollouts == 2) & (torch.arange(len(toy.tokens)) % 2 == 0)
    cut = losses(toy, "mt_opd", {"teacher": without(toy, "teacher", half)})
    whole = losses(toy, "mt_opd")
    others = ~half & (toy.rollouts != 2)
    for view, steps in (("teacher_2", ~half), ("teacher", others)):
        torch.testing.assert_close(cut.terms[view].value[steps], whole.terms[view].value[steps])
    gradient = torch.autograd.grad(cut.loss, toy.hidden, retain_graph=True)[0]
    assert bool((gradient[half] != 0).any()), "the second teacher still speaks there"


def test_identical_teachers_without_a_transcript_are_one_teacher() -> None:
    toy = Toy()
    alone = losses(toy, "mt_opd", settings={"teachers": 1})
    same = toy.view("teacher")[0] @ toy.view("teacher")[1].T
    settings = {"transcript": False, "weights": "equal"}
    for name, more in (("mt_opd", {}), ("mad_opd", settings)):
        found = losses(toy, name, {"teacher_2": same}, settings=more)
        torch.testing.assert_close(found.loss, alone.loss, rtol=1e-12, atol=1e-14)


def test_equal_confidences_are_equal_weights_with_the_transcript_still_in_sight() -> None:
    equal = registry.load("mad_opd", weights="equal")
    assert all(view.render is not None for view in equal.views.values())
    toy = Toy()
    torch.testing.assert_close(losses(toy, "mad_opd", confidences=[60, 60]).loss, losses(toy, "mt_opd").loss)


def test_fixed_weights_are_divided_by_their_sum() -> None:
    toy = Toy()
    found = losses(toy, "mt_opd", settings={"weights": (3.0, 1.0)})
    one, two = (losses(toy, "mt_opd").terms[view].value for view in ("teacher", "teacher_2"))
    means = [0.75 * one[toy.rollouts == own].mean() + 0.25 * two[toy.rollouts == own].mean() for own in range(5)]
    torch.testing.assert_close(found.loss, torch.stack(means).mean(), rtol=1e-12, atol=1e-14)
    for wrong in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(UserError, match="2 positive numbers"):
            registry.load("mt_opd", weights=wrong)


def test_jsd_is_at_most_ln_2_and_its_logit_gradient_at_most_what_was_searched() -> None:
    draw = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 2, 400, dtype=torch.float64)[:, None]
    student = (torch.randn(400, 6, generator=draw, dtype=torch.float64) * scale).requires_grad_()
    teacher = torch.randn(400, 6, generator=draw, dtype=torch.float64) * scale.flip(0)
    found = token_losses(
        registry.load("mt_opd", teachers=1),
        student_logits=student,
        teacher_logits=teacher,
        tokens=torch.zeros(400, dtype=torch.long),
        rollouts=torch.arange(400),
    )
    assert float(found.terms["teacher"].value.detach().max()) <= math.log(2) + 1e-12
    gradient = torch.autograd.grad(found.loss, student)[0] * 400
    assert 0.05 < float(gradient.abs().max()) < 0.16


def test_reverse_kl_grows_with_the_gap_of_a_teacher_and_jsd_does_not() -> None:
    def gradient(divergence: str, gap: float) -> float:
        student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor([[0.0, 0.0, -gap]], dtype=torch.float64)
        method = registry.load("mt_opd", teachers=1, divergence=divergence)
        given = {"teacher_logits": teacher, "tokens": torch.tensor([0])}
        return float(
            torch.autograd.grad(token_losses(method, student_logits=student, **given).loss, student)[0].abs().max()
        )

    assert gradient("reverse_kl", 20) == pytest.approx(4.4, abs=0.1)
    assert gradient("reverse_kl", 80) == pytest.approx(17.8, abs=0.1)
    assert gradient("jsd", 80) == pytest.approx(gradient("jsd", 20), abs=1e-6)
    assert gradient("jsd", 80) == pytest.approx(0.10, abs=0.01)


def test_steps_of_an_episode_are_summed_and_each_keeps_its_own_mean() -> None:
    toy = Toy()
    value = losses(toy, "mt_opd").terms
    mean = 0.5 * value["teacher"].value + 0.5 * value["teacher_2"].value
    expected = torch.stack(
        [
            torch.stack([mean[here & (toy.turns == turn)].mean() for turn in toy.turns[here].unique()]).sum()
            for rollout in range(5)
            for here in [toy.rollouts == rollout]
        ]
    ).mean()
    torch.testing.assert_close(losses(toy, "opad").loss, expected, rtol=1e-12, atol=1e-14)


def test_an_episode_of_one_step_is_a_debated_completion() -> None:
    toy, sure = Toy(), [[95, 90], [1, 2], [None, 3], [50, 60], [70, 20]]
    one = losses(toy, "opad", turns=torch.zeros_like(toy.turns), confidences=sure)
    torch.testing.assert_close(one.loss, losses(toy, "mad_opd", confidences=sure).loss, rtol=1e-12, atol=1e-14)


def test_the_mean_over_steps_counts_those_about_which_some_teacher_speaks() -> None:
    toy = Toy()
    silent = (toy.rollouts == 1) & (toy.turns == 0)
    views = {view: without(toy, view, silent) for view in ("teacher", "teacher_2")}
    found = losses(toy, "opad", views, settings={"reduction": "turn_means"})
    kept = (~silent).nonzero().squeeze(-1)
    sliced = losses(toy, "opad", settings={"reduction": "turn_means"}, mask=~silent)
    assert len(kept) < len(toy.tokens)
    torch.testing.assert_close(found.loss, sliced.loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mt_opd", {"teachers": 0}, "at least 1"),
        ("mt_opd", {"top_k": 1}, "nothing would be learnt"),
        ("mad_opd", {"rounds": 0}, "at least one round"),
        ("mad_opd", {"debate_temperature": 0.0}, "temperature"),
        ("mad_opd", {"debate_tokens": 0}, "at least 1"),
        ("mad_opd", {"weights_temperature": -1.0}, "positive"),
        ("mad_opd", {"repetition_limit": 0.0}, "repetition_limit"),
        ("opad", {"divergence": "jsd", "teacher_weight": 1.0}, "strictly between"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.load(name, **settings)
