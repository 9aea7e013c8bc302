"""VA-OPD: its weights against the published numbers and against plain Python, and the limits in which it is OPD."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from imaged import asked
from torch import Tensor, tensor

from retort.core.losses import TokenLosses
from retort.core.rollouts import Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.core.steps import Steps
from retort.errors import UserError
from retort.functional import linear_token_losses, token_losses
from retort.registry import load
from retort.teachers.view_input import ViewInput
from retort.weights.visual import high_group, sibling_weights, visual_advantage

VOCAB = 7
#: Rollouts of three prompts: 4, 1 and 3 siblings, of these many tokens.
LENGTHS, GROUPS = (5, 35, 1, 12, 6, 8, 8, 3), (0, 0, 0, 0, 1, 2, 2, 2)
DRAW = torch.Generator().manual_seed(0)
STUDENT, TEACHER, POOR = (2 * torch.randn(sum(LENGTHS), VOCAB, generator=DRAW, dtype=torch.float64) for _ in range(3))
TOKENS = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=DRAW)
ROLLOUTS = torch.arange(len(LENGTHS)).repeat_interleave(tensor(LENGTHS))


def losses(student: Tensor = STUDENT, teacher: Tensor = TEACHER, poor: Tensor = POOR, **settings: Any) -> TokenLosses:
    return token_losses(
        load("va_opd", **settings),
        student_logits=student,
        teacher_logits=teacher,
        extra_views={"pixelated": poor},
        tokens=TOKENS,
        rollouts=ROLLOUTS,
        groups=tensor(GROUPS),
    )


def weights(**settings: Any) -> list[float]:
    return losses(**settings).terms["distillation"].weight.tolist()


def by_hand(high_share: tuple[int, int] = (1, 5), high_weight: float = 0.5, tau: float = 1.0) -> list[float]:
    """The weights by the definition, with loops; the share of the high group is a fraction."""
    seen, poor = (logits.log_softmax(-1).gather(-1, TOKENS[:, None]).squeeze(-1).tolist() for logits in (TEACHER, POOR))
    advantage = [max(a - b, 0.0) for a, b in zip(seen, poor, strict=True)]
    starts = [sum(LENGTHS[:k]) for k in range(len(LENGTHS))]
    own = [advantage[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
    means, found = [sum(values) / len(values) for values in own], list[float]()
    for k, values in enumerate(own):
        siblings = [mean for mean, group in zip(means, GROUPS, strict=True) if group == GROUPS[k]]
        middle = sum(siblings) / len(siblings)
        spread = math.sqrt(sum((mean - middle) ** 2 for mean in siblings) / len(siblings)) + 1e-6
        share = math.exp((means[k] - middle) / spread / tau)
        share /= sum(math.exp((mean - middle) / spread / tau) for mean in siblings)
        count = -(-high_share[0] * len(values) // high_share[1])
        high = sorted(range(len(values)), key=lambda t: (-values[t], t))[:count]
        for t in range(len(values)):
            inside, low = t in high, len(values) - count
            part = (high_weight if low else 1.0) / count if inside else (1 - high_weight) / low
            found.append(share * part)
    return found


def test_the_published_weights_of_rollouts() -> None:
    means = tensor([0.045, 0.030, 0.020, 0.010])
    found = sibling_weights(means, tensor([0, 0, 0, 0]), 1.0)
    assert [round(x, 3) for x in found.tolist()] == [0.656, 0.206, 0.095, 0.044]
    order = tensor([2, 0, 3, 1])
    torch.testing.assert_close(sibling_weights(means[order], tensor([0] * 4), 1.0), found[order])
    two = sibling_weights(means, tensor([1, 0, 1, 0]), 1.0)
    torch.testing.assert_close(two[[0, 2]].sum(), two[[1, 3]].sum())


@pytest.mark.parametrize("means", [[0.3], [0.3, 0.3, 0.3], [0.0] * 5])
def test_equal_advantages_and_single_rollouts_have_equal_weights(means: list[float]) -> None:
    found = sibling_weights(tensor(means), torch.zeros(len(means), dtype=torch.long), 1.0)
    assert found.tolist() == pytest.approx([1 / len(means)] * len(means), abs=1e-12)


def test_extreme_temperatures_of_the_weights() -> None:
    means, group = tensor([0.1, 0.4, 0.2]), tensor([0, 0, 0])
    assert sibling_weights(means, group, math.inf).tolist() == pytest.approx([1 / 3] * 3)
    assert sibling_weights(means, group, 1e6).tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert sibling_weights(means, group, 1e-9).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("length", "share", "count"), [(6, 0.2, 2), (35, 0.2, 7), (1, 0.2, 1), (10, 0.3, 3), (4, 1.0, 4)]
)
def test_the_high_group_is_rounded_up_exactly(length: int, share: float, count: int) -> None:
    steps = Steps.of(torch.zeros(length, dtype=torch.long))
    assert int(high_group(torch.rand(length), steps.rollouts(), share).sum()) == count


def test_ties_go_to_the_earlier_token() -> None:
    rollouts = Steps.of(torch.zeros(12, dtype=torch.long), tensor([0] * 6 + [1] * 6)).rollouts()
    found = high_group(tensor([0, 1, 0, 0, 0, 0, 2, 0, 2, 2, 2, 0]), rollouts, 0.3)
    assert found.nonzero().squeeze(-1).tolist() == [0, 1, 6, 8]


def test_the_published_weights_of_tokens() -> None:
    """Scores of 9, 1, 1, 1, 1, of which one in five is high."""
    seen = torch.full((5, 2), 0.0, dtype=torch.float64)
    poor = tensor([[-9.0, 9.0], *[[-1.0, 1.0]] * 4], dtype=torch.float64)
    found = token_losses(
        "va_opd",
        student_logits=seen,
        teacher_logits=seen,
        extra_views={"pixelated": poor},
        tokens=torch.zeros(5, dtype=torch.long),
        groups=tensor([0]),
    )
    assert found.terms.keys() == {"distillation"}
    assert found.terms["distillation"].weight.tolist() == pytest.approx([0.5] + [0.125] * 4)


@pytest.mark.parametrize(
    ("settings", "hand"),
    [
        ({}, {}),
        ({"high_share": 0.3, "high_weight": 0.8}, {"high_share": (3, 10), "high_weight": 0.8}),
        ({"weight_temperature": 0.25}, {"tau": 0.25}),
    ],
)
def test_weights_and_loss_are_those_of_the_definition(settings: dict[str, Any], hand: dict[str, Any]) -> None:
    found = losses(**settings)
    term = found.terms["distillation"]
    assert term.weight.tolist() == pytest.approx(by_hand(**hand), rel=1e-6)
    for group in range(3):
        inside = tensor([GROUPS[int(rollout)] == group for rollout in ROLLOUTS])
        assert float(term.weight[inside].sum()) == pytest.approx(1.0)
    p_S, p_T = STUDENT.softmax(-1), TEACHER.softmax(-1)
    divergence = (p_S * (p_S.log() - p_T.log())).sum(-1)
    torch.testing.assert_close(term.value, divergence)
    assert found.loss.item() == pytest.approx(float((divergence * tensor(by_hand(**hand))).sum() / 3))


def test_the_divergence_of_a_coin() -> None:
    found = token_losses(
        "va_opd",
        student_logits=tensor([[0.75, 0.25]], dtype=torch.float64).log(),
        teacher_logits=torch.zeros(1, 2, dtype=torch.float64),
        extra_views={"pixelated": torch.zeros(1, 2, dtype=torch.float64)},
        tokens=tensor([0]),
        groups=tensor([0]),
    )
    assert found.loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_siblings_in_another_order_have_the_same_weights() -> None:
    order = [3, 1, 0, 2, 4, 7, 5, 6]
    rows = torch.cat([torch.eq(ROLLOUTS, rollout).nonzero().squeeze(-1) for rollout in order])
    moved = token_losses(
        load("va_opd"),
        student_logits=STUDENT[rows],
        teacher_logits=TEACHER[rows],
        extra_views={"pixelated": POOR[rows]},
        tokens=TOKENS[rows],
        rollouts=torch.arange(8).repeat_interleave(tensor([LENGTHS[k] for k in order])),
        groups=tensor([GROUPS[k] for k in order]),
    )
    torch.testing.assert_close(moved.terms["distillation"].weight, losses().terms["distillation"].weight[rows])
    torch.testing.assert_close(moved.loss, losses().loss)


def test_the_pixelated_view_is_no_target_and_gets_no_gradient() -> None:
    student, teacher, poor = (logits.clone().requires_grad_() for logits in (STUDENT, TEACHER, POOR))
    found = losses(student, teacher, poor).loss
    ours, theirs, its = torch.autograd.grad(found, (student, teacher, poor), allow_unused=True)
    assert ours.abs().max() > 0
    assert theirs is None and its is None
    # Only what it says of the token that was drawn counts: the other ids may be anything.
    drawn = POOR.log_softmax(-1).gather(-1, TOKENS[:, None])
    rest = torch.rand(POOR.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rest.scatter_(-1, TOKENS[:, None], 0.0)
    moved = (rest / rest.sum(-1, keepdim=True) * (1 - drawn.exp())).log().scatter(-1, TOKENS[:, None], drawn)
    torch.testing.assert_close(losses(poor=moved).loss, losses().loss)


def test_where_it_is_plain_opd_and_where_not() -> None:
    """Equal advantages alone do not make it so; with the share of the high group as its weight they do."""
    length = 10
    logits = 2 * torch.randn(4 * length, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given: dict[str, Any] = {
        "student_logits": logits,
        "teacher_logits": logits.flip(0),
        "tokens": torch.zeros(4 * length, dtype=torch.long),
        "rollouts": torch.arange(4).repeat_interleave(length),
        "groups": tensor([0, 0, 1, 1]),
    }
    same = {"extra_views": {"pixelated": logits.flip(0)}}  # no token has any advantage
    plain = token_losses(load("gkd", divergence="reverse_kl", temperature=1.0), **given).loss
    found = token_losses(load("va_opd"), **given, **same).loss
    assert abs(found - plain) > 1e-3
    torch.testing.assert_close(token_losses(load("va_opd", high_weight=0.2), **given, **same).loss, plain)
    far = {"extra_views": {"pixelated": torch.roll(logits, 1, 0)}}
    settings = {"high_weight": 0.2, "weight_temperature": math.inf}
    torch.testing.assert_close(token_losses(load("va_opd", **settings), **given, **far).loss, plain)
    whole = {"high_share": 1.0, "weight_temperature": math.inf}
    torch.testing.assert_close(token_losses(load("va_opd", **whole), **given, **far).loss, plain)


def test_a_weight_of_one_leaves_out_the_low_group() -> None:
    found = weights(high_weight=1.0)
    kept = [value for value, hand in zip(found, by_hand(high_weight=1.0), strict=True) if hand == 0.0]
    assert kept and set(kept) == {0.0}


def test_prompts_without_an_image_are_left_out_and_others_stay_as_they_are() -> None:
    has = tensor([GROUPS[int(rollout)] != 2 for rollout in ROLLOUTS])
    said = replace(Dense.of(POOR.masked_fill(~has[:, None], 0.0), TOKENS), valid_N=has)
    found = losses(poor=said).terms["distillation"]  # type: ignore[arg-type]
    torch.testing.assert_close(found.weight[has], losses().terms["distillation"].weight[has])
    assert not found.weight[~has].any() and torch.equal(found.counted, has)
    value = losses(poor=said).loss  # type: ignore[arg-type]
    torch.testing.assert_close(value, (found.weight * found.value).sum() / 2)


def test_what_a_view_rules_out_is_a_number() -> None:
    seen, poor = tensor([-1.0, -math.inf, -math.inf, -3.0]), tensor([-math.inf, -math.inf, -1.0, -1.0])
    assert visual_advantage(seen, poor).tolist() == [100.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_temperature": 0.0}, "weight_temperature must be positive"),
        ({"high_share": 0.0}, "high_share must lie above 0"),
        ({"high_share": 1.5}, "high_share must lie above 0"),
        ({"high_weight": -0.1}, r"high_weight must lie in \[0, 1\]"),
        ({"ratio": 0.0}, "ratio must lie above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load("va_opd", **settings)
    assert "va_opd" in str(caught.value)


def test_groups_and_the_pixelated_view_are_asked_for() -> None:
    given: dict[str, Any] = {"student_logits": STUDENT, "teacher_logits": TEACHER, "tokens": TOKENS}
    with pytest.raises(UserError, match=r"needs groups"):
        token_losses("va_opd", **given, extra_views={"pixelated": POOR})
    with pytest.raises(UserError, match=r"needs a signal for view 'pixelated'"):
        token_losses("va_opd", **given, groups=tensor([0]))


def test_a_chunk_at_a_time_is_the_whole_batch() -> None:
    draw = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(rows, 4, generator=draw, dtype=torch.float64) for rows in (len(TOKENS), VOCAB))
    given: dict[str, Any] = {"tokens": TOKENS, "rollouts": ROLLOUTS, "groups": tensor(GROUPS)}
    views = {"pixelated": (hidden.roll(1, 0), head)}
    for chunk in (1, 5, 100):
        found = linear_token_losses(
            "va_opd",
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=hidden.flip(0),
            teacher_head=head,
            extra_views=views,
            chunk=chunk,
            **given,
        )
        whole = token_losses(
            "va_opd",
            student_logits=hidden @ head.T,
            teacher_logits=hidden.flip(0) @ head.T,
            extra_views={"pixelated": hidden.roll(1, 0) @ head.T},
            **given,
        )
        torch.testing.assert_close(found.loss, whole.loss)


def test_the_teacher_reads_the_image_and_the_pixelated_one() -> None:
    method, prompt = load("va_opd", ratio=0.5), asked()
    rollout = Rollout(prompt, (TokenSequence.of([0]).then([0], decided=True),))
    shown = {name: view.prompt(ViewInput(rollout, (rollout,))) for name, view in method.views.items()}
    assert shown["teacher"] is prompt
    poor = shown["pixelated"]
    assert poor is not None and poor.text == prompt.text
    assert [image.size for image in poor.images] == [image.size for image in prompt.images]
    assert poor.images[0].digest != prompt.images[0].digest
