"""Losses across two tokenizers: references, limits, and chunks that keep units whole."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import two_tokenizers as two
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from two_tokenizers import F64, Pair, Reference

from retort.advantages import log_ratio, return_to_go
from retort.core import chunked
from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.losses import TokenLosses
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.errors import SignalError, UserError
from retort.estimators import score_function
from retort.functional import cross_token_losses, token_losses
from retort.method import Method, Term
from retort.quantities import sampled_reverse_kl
from retort.registry import load
from retort.rollout.plan import RolloutPlan

OLD = {"old_logp": True}
CASES: dict[str, tuple[str, dict[str, Any], Reference]] = {
    "simct": ("simct", {}, two.simct()),
    "simct-raw": ("simct", {"score": "raw_logit"}, two.simct("raw_logit")),
    "simct-mask": ("simct", {"gh_threshold": 2.0}, two.simct(threshold=2.0)),
    "strict_ct": ("strict_ct", {"top_k": 3}, two.strict(3)),
    "strict_ct-all": ("strict_ct", {"top_k": None}, two.strict(None)),
    "simple_ctkd": ("simple_ctkd", {}, two.strict(None)),
    "alm": ("alm", {"tau": 10.0}, two.likelihood(10.0)),
    "uld": ("uld", {"top_k": 4}, two.uld(4)),
    "uld-all": ("uld", {}, two.uld(1024)),
    "gold": ("gold", {}, two.gold()),
    "gold-bayesian": ("gold", {"merge": "bayesian"}, two.gold("bayesian")),
    "gold-hybrid": ("gold", {"hybrid": True}, two.gold(hybrid=True)),
    "gold-weights": (
        "gold",
        {"merge": "bayesian", "hybrid": True, "matched_weight": 0.9, "unmatched_weight": 0.3, "teacher_weight": 0.2},
        two.gold("bayesian", hybrid=True, weights=(0.9, 0.3), jsd=0.2),
    ),
    "opd": ("opd", {}, two.sampled(lambda theirs, old: theirs - old)),
    "opd-clip": ("opd", {"clip": 0.05}, two.sampled(lambda theirs, old: theirs - old, clip=0.05)),
    "power_opd": (
        "power_opd",
        {"power": 0.7},
        two.sampled(lambda theirs, old: (0.7 * theirs).exp() - (0.7 * old).exp()),
    ),
    "vopd": ("vopd", {"top_k": 3}, two.with_baseline(3)),
    "vopd-all": ("vopd", {"top_k": None}, two.with_baseline(None)),
}


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_a_loop_over_units(case: str, seed: int) -> None:
    (name, given_settings, reference), pair = CASES[case], Pair(seed=seed)
    ours = pair.losses(load(name, **given_settings), old_logp=pair.old).loss
    theirs = pair.per_token(two.total(pair, reference))
    assert ours.dtype == F64
    assert float(theirs.detach().abs()) > 1e-3
    close((ours, *pair.gradients(ours)), (theirs, *pair.gradients(theirs)))


@pytest.mark.parametrize("name", ["simct", "strict_ct", "uld"])
def test_the_term_on_the_decision_to_stop(name: str) -> None:
    pair = Pair()
    ours = pair.losses(load(name, stop_coef=0.3)).loss - pair.losses(load(name)).loss
    theirs = 0.3 * pair.per_token(two.total(pair, two.stop_decision))
    close((ours, *pair.gradients(ours)), (theirs, *pair.gradients(theirs)))
    with pytest.raises(SignalError, match="no stop ids"):
        pair.losses(load(name, stop_coef=0.3), stops=None)


@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation"])
def test_other_divergences_of_likelihoods(divergence: str) -> None:
    pair, found = Pair(), torch.zeros((), dtype=F64)
    for unit in pair.units:
        p, q = ((logp / 4.0).exp() for logp in two.sums(pair, unit))
        both = two.kl(torch.stack([p, 1 - p]), torch.stack([q, 1 - q]))
        found = found + (both if divergence == "reverse_kl" else (p - q).abs())
    ours, theirs = pair.losses(load("alm", tau=4.0, divergence=divergence)).loss, pair.per_token(found)
    close((ours, *pair.gradients(ours)), (theirs, *pair.gradients(theirs)))


def test_values_are_at_first_steps_and_steps_outside_of_units_do_not_count() -> None:
    pair = Pair()
    term = pair.losses("simct").terms["divergence"]
    first = torch.zeros(len(pair.tokens[0]), dtype=torch.bool)
    inside = torch.zeros_like(first)
    for own, _ in pair.units:
        first[own.start], inside[own] = True, True
    assert not inside.all()
    assert torch.equal(term.counted, inside)
    assert (term.value[first] > 0).all()
    assert (term.value[~first] == 0).all()
    for index, unit in enumerate(pair.units):  # the gradient reaches the last token of every span
        value = term.value[unit[0].start]
        (gradient,) = torch.autograd.grad(value, pair.hidden, retain_graph=True)
        touched = gradient.abs().sum(-1) > 0
        expected = torch.zeros_like(touched)
        expected[unit[0]] = True
        assert torch.equal(touched, expected), index


def test_a_run_divides_by_the_tokens_in_units() -> None:
    pair = Pair()
    inside = sum(own.stop - own.start for own, _ in pair.units)
    close((pair.dense("simct").loss,), (two.total(pair, two.simct()) / inside,))


def test_an_anchor_joins_what_minimal_units_keep_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    given_: dict[str, Any] = {
        "student_logits": torch.randn(3, 9, generator=draw, dtype=F64),
        "teacher_logits": torch.randn(3, 10, generator=draw, dtype=F64),
        "student_tokens": torch.tensor([6, 7, 0]),
        "teacher_tokens": torch.tensor([1, 2, 3]),
        "student_pieces": [b"ab", b"c", b"d"],
        "teacher_pieces": [b"a", b"bc", b"d"],
        "shared": two.SHARED,
    }
    minimal = cross_token_losses("simct", **given_).terms["divergence"].value
    anchor = cross_token_losses("simct", segmentation="anchor", **given_).terms["divergence"].value
    assert (minimal > 0).tolist() == [True, False, True]
    assert (anchor > 0).tolist() == [True, False, False]
    pair = Pair([[(2, 2), (1, 1)]], tail=0)
    pair.hidden, pair.head = given_["student_logits"], torch.eye(9, dtype=F64)
    pair.teacher_logits, pair.tokens = given_["teacher_logits"], (given_["student_tokens"], given_["teacher_tokens"])
    for values, units in ((minimal, pair.units), (anchor, [(slice(0, 3), slice(0, 3))])):
        expected = [float(two.simct()(pair, unit).detach()) for unit in units]
        assert [float(x) for x in values if x > 0] == pytest.approx(expected, rel=1e-12)


# --- limits ---


class Same:
    """Two models with one tokenizer."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.student = torch.randn(6, 9, generator=draw, dtype=F64).requires_grad_()
        self.teacher = torch.randn(6, 9, generator=draw, dtype=F64)
        self.tokens = torch.randint(0, 9, (6,), generator=draw)
        self.pieces = [bytes([97 + int(token)]) for token in self.tokens]

    def losses(self, name: str, teacher: Tensor | None = None, **more: Any) -> Tensor:
        return cross_token_losses(
            load(name, **more),
            student_logits=self.student,
            teacher_logits=self.teacher if teacher is None else teacher,
            student_tokens=self.tokens,
            teacher_tokens=self.tokens,
            student_pieces=self.pieces,
            teacher_pieces=self.pieces,
            shared=[(i, i) for i in range(9)],
        ).loss

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.student)[0]


@pytest.mark.parametrize(
    ("name", "more", "other", "others"),
    [
        ("simct", {}, "gkd", {"divergence": "reverse_kl"}),
        ("simct", {"score": "raw_logit"}, "gkd", {"divergence": "reverse_kl"}),
        ("strict_ct", {"top_k": None}, "gkd", {"divergence": "reverse_kl"}),
        ("strict_ct", {"top_k": 4}, "topk_kl", {"top_k": 4}),
        ("uld", {}, "uld", {}),
        ("gold", {}, "uld", {}),
        ("gold", {"merge": "bayesian"}, "uld", {}),
        ("gold", {"hybrid": True, "teacher_weight": 0.3}, "gkd", {"teacher_weight": 0.3}),
        ("opd", {}, "opd", {}),
        ("power_opd", {}, "power_opd", {}),
        ("vopd", {}, "vopd", {}),
        ("vopd", {"top_k": None}, "vopd", {"top_k": None}),
    ],
)
def test_with_one_tokenizer_it_is_what_one_tokenizer_gives(
    name: str, more: dict[str, Any], other: str, others: dict[str, Any]
) -> None:
    same = Same()
    ours = same.losses(name, **more)
    theirs = token_losses(
        load(other, **others), student_logits=same.student, teacher_logits=same.teacher, tokens=same.tokens
    ).loss
    close((ours, same.gradient(ours)), (theirs, same.gradient(theirs)), 1e-12)


@pytest.mark.parametrize("name", ["simct", "strict_ct", "uld", "gold", "opd", "power_opd", "vopd"])
def test_zero_where_the_teacher_is_the_student(name: str) -> None:
    same = Same()
    loss = same.losses(name, same.student.detach())
    assert float(loss.detach().abs()) < 1e-12
    assert float(same.gradient(loss).abs().max()) < 1e-12


@pytest.mark.parametrize(("score", "moves"), [("log_prob", False), ("raw_logit", True)])
def test_a_constant_on_a_later_position_moves_only_raw_logits(score: str, moves: bool) -> None:
    """The specification's numbers: a span of 0.011 becomes one of 0.118 by +5 on its second logits, 0.0098 stays."""
    pair = Pair([[(2, 1)]], tail=0)
    pair.tokens, pair.shared = (torch.tensor([1, 1]), torch.tensor([1])), [(0, 0)]
    # Of a first position without a normaliser, and a second with one of 0.2148; the span's score is ln 0.0098 to the
    # shared id's ln 0.9902 then.
    first = torch.full((9,), -50.0, dtype=F64)
    first[0], first[1] = math.log(0.99), math.log(0.01)
    span = 2 * math.log(0.99 * 0.0098 / 0.9902) - math.log(0.01)
    second = torch.full((9,), math.log1p(-math.exp(span)) - math.log(8), dtype=F64)
    second[1] = span
    pair.head = torch.eye(9, dtype=F64)
    found = []
    for shift in (0.0, 5.0):
        pair.hidden = torch.stack([first, second + 0.2148 + shift])
        found.append((float(two.span_scores(pair, pair.units[0], score)[0][1]), float(pair.losses(_simct(score)).loss)))
    (before, loss), (after, moved) = found
    assert (round(before, 4), round(after, 3)) == ((0.0109, 0.118) if moves else (0.0098, 0.010))
    assert (moved == pytest.approx(loss, abs=1e-12)) is not moves
    for shift, (_, value) in zip((0.0, 5.0), found, strict=True):
        pair.hidden = torch.stack([first, second + 0.2148 + shift])
        assert value == pytest.approx(float(pair.per_token(two.total(pair, two.simct(score)))), abs=1e-10)


def _simct(score: str) -> Method:
    return load("simct", score=score)


def test_a_dimension_that_both_rule_out_changes_nothing() -> None:
    pair = Pair()
    plain = pair.losses("simct").loss
    longer = torch.cat([pair.logits, torch.full((len(pair.logits), 1), -1e9, dtype=F64)], 1)
    theirs = torch.cat([pair.teacher_logits, torch.full((len(pair.teacher_logits), 1), -1e9, dtype=F64)], 1)
    more = pair.losses("simct", student_logits=longer, teacher_logits=theirs, shared=[*pair.shared, (9, 10)]).loss
    close((more, *pair.gradients(more)), (plain, *pair.gradients(plain)), 1e-13)


def test_coarser_outcomes_can_only_reduce_the_divergence() -> None:
    pair, draw = Pair(), torch.Generator().manual_seed(5)
    for unit in pair.units:
        student, teacher = (side.detach() for side in two.span_scores(pair, unit))
        group = torch.randint(0, 3, (len(student),), generator=draw)
        coarse = [torch.zeros(3, dtype=F64).index_add(0, group, side)[group.unique()] for side in (student, teacher)]
        within = two.kl(student, teacher) - two.kl(*coarse)
        parts = [
            coarse[0][place] * two.kl(student[group == g] / coarse[0][place], teacher[group == g] / coarse[1][place])
            for place, g in enumerate(group.unique())
        ]
        assert float(within) >= 0
        assert float(within) == pytest.approx(float(sum(parts)), abs=1e-12)


def test_the_sampled_gradient_is_that_of_the_units_reverse_kl() -> None:
    """All four texts of two student tokens, each of which is one token of the teacher."""
    draw = torch.Generator().manual_seed(7)
    student = torch.randn(3, 2, generator=draw, dtype=F64).requires_grad_()  # at the beginning, after 0, after 1
    teacher = torch.randn(1, 4, generator=draw, dtype=F64)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)[0]
    exact, expected = torch.zeros((), dtype=F64), torch.zeros_like(student)
    for one, other in itertools.product((0, 1), repeat=2):
        text = 2 * one + other
        logp = p[0, one] + p[1 + one, other]
        exact = exact + logp.exp() * (logp - q[text])
        loss = cross_token_losses(
            "opd",
            student_logits=student[[0, 1 + one]],
            teacher_logits=teacher,
            student_tokens=torch.tensor([one, other]),
            teacher_tokens=torch.tensor([text]),
            student_pieces=[b"a", b"b"],
            teacher_pieces=[b"ab"],
            shared=[],
        ).loss
        expected += float(logp.detach().exp()) * 1.5 * torch.autograd.grad(loss, student, retain_graph=True)[0]
    close((torch.autograd.grad(exact, student)[0],), (expected,), 1e-12)


def test_a_merged_number_is_the_units_probability_at_what_was_written() -> None:
    """One student token of one unit, two of the teacher's; the distance is a sum over ids, so any one can be read."""
    draw = torch.Generator().manual_seed(11)
    student, teacher = torch.randn(1, 2, generator=draw, dtype=F64), torch.randn(2, 2, generator=draw, dtype=F64)
    q = teacher.softmax(-1)
    for merge, expected in (("observed", q[0] * q[1, 1]), ("bayesian", q[0, 0] * q[1])):
        loss = cross_token_losses(
            load("gold", merge=merge),
            student_logits=student,
            teacher_logits=teacher,
            student_tokens=torch.tensor([0]),
            teacher_tokens=torch.tensor([0, 1]),
            student_pieces=[b"ab"],
            teacher_pieces=[b"a", b"b"],
            shared=[],
        ).loss
        assert float(q[0, 0] * q[1, 1]) in expected.tolist(), "what was written has its joint probability"
        theirs = two.in_order(student[0].softmax(0), expected) / 1.5
        close((loss,), (theirs,), 1e-12)


def test_a_signal_without_the_teachers_tokens_is_refused_by_methods_that_read_them() -> None:
    pair = Pair()
    bare = pair.spans(theirs=None, their_first_N=None)
    given_: dict[str, Any] = {"student_logits": pair.logits, "tokens": pair.tokens[0], "rollouts": pair.rollouts[0]}
    with pytest.raises(SignalError, match="no tokens of the teacher's"):
        token_losses("gold", teacher_logits=bare, **given_)
    assert float(token_losses("simct", teacher_logits=bare, **given_).loss.detach()) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"matched_weight": 0.5}, "or neither"),
        ({"matched_weight": -0.5, "unmatched_weight": 1.0}, "must not be negative"),
        ({"teacher_weight": 1.0}, "strictly between 0 and 1"),
    ],
)
def test_settings_of_gold_that_do_not_fit(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("gold", **more)


# --- chunks ---

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))
THROUGH_THE_CORE = [
    ("simct", {"stop_coef": 0.5}),
    ("strict_ct", {"top_k": 3}),
    ("uld", {"top_k": 4}),
    ("gold", {"merge": "bayesian", "hybrid": True}),
    ("opd", {}),
    ("power_opd", {}),
    ("vopd", {"top_k": 3}),
]


@pytest.mark.parametrize(("name", "more"), THROUGH_THE_CORE, ids=[name for name, _ in THROUGH_THE_CORE])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    layout=st.lists(st.lists(SIZES, min_size=1, max_size=5), min_size=2, max_size=3),
    chunk=st.integers(1, 9),
    block=st.integers(1, 60),
    tail=st.integers(0, 2),
)
def test_any_chunk_and_block_gives_the_same_value_and_gradient(
    name: str, more: dict[str, Any], layout: list[list[tuple[int, int]]], chunk: int, block: int, tail: int
) -> None:
    pair, method = Pair(layout, tail=tail), load(name, **more)
    dense = pair.dense(method, old_logp=pair.old)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunked, "BLOCK_ELEMENTS", block)
        linear = pair.linear(method, old_logp=pair.old, chunk=chunk)
        close((linear.loss,), (dense.loss,), 1e-12)
        # The gradient of the loss is formed on the way; for that of values the logits are computed again.
        close(pair.gradients(_both(linear)), pair.gradients(_both(dense)), 1e-11)


def _both(losses: TokenLosses) -> Tensor:
    return losses.loss + torch.stack([0.3 * term.value.sum() for term in losses.terms.values()]).sum()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 9))
def test_cuts_keep_units_whole(units: list[int], part: int) -> None:
    begins = torch.zeros(sum(units), dtype=torch.bool)
    begins[list(itertools.accumulate([0, *units[:-1]]))] = True
    found = chunked.cuts(len(begins), part, begins)
    assert [index for cut in found for index in range(cut.start, cut.stop)] == list(range(len(begins)))
    for cut in found:
        assert begins[cut.start]
        assert cut.stop - cut.start <= part or int(begins[cut].sum()) == 1, "only a unit alone is longer"
    for cut, following in itertools.pairwise(found):  # as few cuts as can be
        after = begins[following.start + 1 :].nonzero()
        whole = following.start + 1 + int(after[0]) if len(after) else len(begins)
        assert whole - cut.start > part


@pytest.mark.parametrize("name", ["simct", "opd", "vopd"])
def test_the_order_of_rollouts_does_not_matter(name: str) -> None:
    pair = Pair()
    order = torch.cat([(pair.rollouts[0] == rollout).nonzero().squeeze(-1) for rollout in (2, 0, 1)])
    close((pair.dense(name, order).loss,), (pair.dense(name).loss,), 1e-12)
    parts = []
    for rollout in range(3):
        index = (pair.rollouts[0] == rollout).nonzero().squeeze(-1)
        signal = pair.spans().select(index)
        assert signal.valid_N is not None
        parts.append(pair.dense(name, index, rollouts=None).loss * int(signal.valid_N.sum()))
    whole = pair.spans().valid_N
    assert whole is not None
    close((torch.stack(parts).sum() / int(whole.sum()),), (pair.dense(name).loss,), 1e-12)


def test_nothing_reaches_the_teacher() -> None:
    pair = Pair()
    for name in ("simct", "strict_ct", "uld", "gold", "opd", "vopd"):
        assert torch.autograd.grad(pair.losses(name).loss, pair.teacher_logits, allow_unused=True) == (None,)


# --- parts of the sampled token ---


def context_of(pair: Pair, **others: Any) -> Context:
    return Context(
        Distribution(pair.logits),
        {"teacher": pair.spans().rows(slice(0, len(pair.tokens[0]))), **others},
        Steps.of(pair.tokens[0], pair.rollouts[0], stored={"old_logp": pair.old}),
        Clock(),
    )


def test_means_over_tokens_count_a_unit_once() -> None:
    pair = Pair()
    context = context_of(pair)
    valid = pair.spans().valid_N
    assert valid is not None
    found = sampled_reverse_kl().at(context, "teacher")[valid]
    units = [float(pair.old[own].sum() - two.sums(pair, (own, theirs))[1]) for own, theirs in pair.units]
    assert float(found.mean()) == pytest.approx(sum(units) / int(valid.sum()), abs=1e-12)
    assert float(context.gap_N("teacher")[valid].sum()) == pytest.approx(-sum(units), abs=1e-12)


def test_every_token_of_a_unit_has_the_units_log_ratio() -> None:
    pair = Pair()
    found = log_ratio().at(context_of(pair), "teacher")
    for own, theirs in pair.units:
        expected = float(two.sums(pair, (own, theirs))[1] - pair.old[own].sum())
        assert found[own].tolist() == pytest.approx([expected] * (own.stop - own.start), abs=1e-12)


def test_a_return_counts_a_unit_once() -> None:
    pair = Pair([[(1, 1), (3, 1), (1, 2)]], tail=0)
    method = Method(rollout=RolloutPlan(), terms=(Term("reverse", score_function(return_to_go(0.5))),))
    gaps = [float(two.sums(pair, unit)[1] - pair.old[unit[0]].sum()) for unit in pair.units]
    returns = [gaps[0] + 0.5 * gaps[1] + 0.5**4 * gaps[2], gaps[1] + 0.5**3 * gaps[2], gaps[2]]
    live = [two.sums(pair, unit)[0] - pair.old[unit[0]].sum() for unit in pair.units]
    expected = [-float(r) * math.exp(float(x.detach())) for r, x in zip(returns, live, strict=True)]
    value = pair.dense(method, old_logp=pair.old).terms["reverse"].value
    assert value[[0, 1, 4]].tolist() == pytest.approx(expected, abs=1e-12)
    assert value[[2, 3]].tolist() == [0.0, 0.0]


def test_a_base_model_is_read_in_the_teachers_units() -> None:
    pair = Pair()
    base = Dense.of(torch.randn(len(pair.tokens[0]), 9, dtype=F64), pair.tokens[0])
    context = context_of(pair, base=base.rows(slice(0, base.steps)))
    found, _ = context.decided_logps("teacher", of="base")
    own = base.rows(slice(0, base.steps)).sampled_logp_N
    for unit, _ in pair.units:
        assert float(found[unit.start]) == pytest.approx(float(own[unit].sum()), abs=1e-12)
    again, _ = context.decided_logps("teacher", of="teacher")
    assert torch.equal(again, context.signal("teacher").sampled_logp_N)
    unlike = replace(pair.spans(), unit_N=torch.arange(len(own)), own_N=torch.ones(len(own), dtype=torch.long))
    with pytest.raises(SignalError, match="different units"):
        context_of(pair, base=unlike.rows(slice(0, len(own)))).decided_logps("teacher", of="base")
    with pytest.raises(SignalError, match="different units"):
        context.decided_logps("base", of="teacher")


# --- refused ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_pieces": [b"a"]}, "give one per token"),
        ({"teacher_logits": torch.zeros(2, 10, dtype=F64)}, "one row per teacher token"),
        ({"student_logits": torch.zeros(2, 9, dtype=F64)}, "one row per token"),
        ({"teacher_rollouts": None}, "or neither"),
        ({"shared": [(0, 99)]}, "outside the teacher's vocabulary of 10"),
        ({"shared": [(99, 0)]}, "outside the student's vocabulary of 9"),
        ({"student_tokens": torch.zeros(19, dtype=F64)}, "must be integers"),
        ({"segmentation": "coarse"}, "no way to cut"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pair().losses("simct", **changed)


def test_rollouts_that_are_mixed_are_refused() -> None:
    pair = Pair()
    mixed = pair.rollouts[0].clone()
    mixed[0] = 2
    with pytest.raises(UserError, match="not neighbours"):
        pair.losses("simct", student_rollouts=mixed)


def test_an_id_in_two_pairs_is_refused() -> None:
    with pytest.raises(SignalError, match="in one of them only"):
        Pair().losses("simct", shared=[(0, 3), (1, 3)])


@pytest.mark.parametrize(
    ("name", "lacks"), [("gkd", "whole distribution"), ("eopd", "top-16"), ("local_teachability", "the student's top")]
)
def test_methods_that_need_more_than_spans_are_refused(name: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"needs .*{lacks}.*another tokenizer; methods that it serves: .*opd.*simct"):
        Pair().losses(name)


def test_a_mask_may_not_cut_a_unit() -> None:
    pair = Pair()
    mask = torch.ones(len(pair.tokens[0]), dtype=torch.bool)
    mask[1] = False
    with pytest.raises(SignalError, match="1 of a unit's 2 steps are here"):
        pair.dense("simct", mask=mask)
    mask[:] = True
    mask[0] = False
    assert not pair.dense("simct", mask=mask).terms["divergence"].value[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"unit_N": s.unit_N.flip(0)}, "steps of a unit|a unit's|matched"),
        (lambda s: {"logp_N": s.logp_N + 50.0}, "above 0"),
        (lambda s: {"logp_N": s.logp_N * math.nan}, "nan"),
        (lambda s: {"own_N": s.own_N[:3]}, "has 3 steps"),
        (lambda s: {"matched_N": torch.ones_like(s.matched_N)}, "can be matched"),
        (lambda s: {"unit_N": torch.where(s.unit_N == 2, 0, s.unit_N)}, "not neighbours|a unit's"),
    ],
)
def test_a_signal_that_contradicts_itself_is_refused(change: Any, message: str) -> None:
    signal = Pair().spans()
    with pytest.raises(SignalError, match=message):
        replace(signal, **change(signal))


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    pair = Pair()
    broken = pair.teacher_logits.detach().clone()
    broken[0, 0] = math.nan
    for name in ("simct", "opd"):
        with pytest.raises(SignalError, match="nan"):
            pair.losses(name, teacher_logits=broken)
