"""Every method at the edges of what it may be given: nothing that counts, tokens that somebody rules out, no number."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from toy import Toy

from retort import registry
from retort.core.context import RULED_OUT, Context
from retort.core.needs import HIDDEN
from retort.core.signals import Sampled
from retort.errors import UserError
from retort.functional import token_losses

NAMES = registry.for_tokens()
F64 = torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_which_nothing_counts_costs_nothing(name: str) -> None:
    toy = Toy()
    found = toy.losses(registry.load(name), mask=torch.zeros(len(toy.tokens), dtype=torch.bool))
    assert found.loss.item() == 0.0
    if found.loss.requires_grad:
        gradients = torch.autograd.grad(found.loss, (toy.hidden, toy.head), allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)


def _banned(toy: Toy, name: str, step: int) -> dict[str, Tensor]:
    """Logits of all views, that of the teacher without the token written at a step."""
    method = registry.load(name)
    views = {view: hidden @ head.T for view in method.views for hidden, head in [toy.view(view)]}
    views = {view: logits_NV.detach().clone() for view, logits_NV in views.items()}
    views["teacher"][step, toy.tokens[step]] = -math.inf
    return views


#: What does not follow from a whole distribution, and so not from logits.
MORE = {HIDDEN.kind, "lookahead"}
#: Methods that ask a teacher, and for nothing else than that.
ASKING = [
    name
    for name in NAMES
    if registry.load(name).views and MORE.isdisjoint(need.kind for need in registry.load(name).needs())
]


@pytest.mark.parametrize("name", ASKING)
def test_a_written_token_that_the_teacher_rules_out_is_never_nan(name: str) -> None:
    """The loss is a number, or infinite; other steps keep a finite gradient unless they share an infinite number."""
    toy, step = Toy(), 3
    views = _banned(toy, name, step)
    found = toy.losses(registry.load(name), teacher_logits=views.pop("teacher"), extra_views=views)
    assert not found.loss.isnan()
    for term in found.terms.values():
        assert not term.value.isnan().any()
        assert term.weight.isfinite().all()
        assert term.value[step + 1 :].isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dasd", {}),
        ("dasd", {"correction_limit": 1.0}),
        ("dasd", {"gap_scale": "std"}),
        ("dasd", {"correction": "raw"}),
        ("uni_opd", {}),
        ("uni_opd", {"calibration": "mask"}),
        ("rlsd", {}),
        ("egrsd", {}),
        ("cl_egrsd", {}),
        ("power_opd", {}),
    ],
)
def test_methods_that_weigh_a_gap_stay_finite(name: str, settings: dict[str, Any]) -> None:
    toy, method = Toy(), registry.load(name, **settings)
    for rollout in (0, 1):  # a right one and a wrong one
        step = int((toy.rollouts == rollout).nonzero()[2])
        views = _banned(toy, name, step)
        found = toy.losses(method, teacher_logits=views.pop("teacher"), extra_views=views)
        assert found.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in toy.gradients(found.loss))


def test_an_infinite_gap_counts_as_a_hundred_nats() -> None:
    tokens, logits = torch.tensor([0, 1]), torch.zeros(2, 4, dtype=F64)
    teacher = Sampled(tokens, logp_N=torch.tensor([-math.inf, -1.0], dtype=F64)).rows(slice(None))
    context = Context.from_logits(logits, tokens, {"teacher": teacher})
    assert context.gap_N("teacher").tolist() == [-RULED_OUT, -1.0 + math.log(4.0)]
    assert context.finite_logp_N("teacher").tolist() == [-math.log(4.0) - RULED_OUT, -1.0]


def test_dasd_with_a_banned_token_by_hand() -> None:
    """One rollout of two tokens, gaps of -100 and ln 2: sizes have a mean of 50.35, and the tanh is 1 (`attract`)."""
    student = torch.zeros(4, 4, dtype=F64)
    teacher = student.clone()
    teacher[0, 0] = -math.inf
    teacher[1] = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=F64).log()
    found = token_losses(
        registry.load("dasd", router="attract", clip=None),
        student_logits=student,
        teacher_logits=teacher,
        tokens=torch.zeros(4, dtype=torch.long),
        rollouts=torch.tensor([0, 0, 1, 1]),
        groups=torch.tensor([0, 0]),
        rewards=torch.tensor([1.0, 0.0], dtype=F64),
    )
    size = (100.0 + math.log(2.0)) / 2 + 1e-6
    advantage = 0.5 / (0.5**0.5 + 1e-6)
    for step, gap in ((0, -100.0), (1, math.log(2.0))):
        bar = gap / size
        wanted = advantage + 0.1 * bar / (1 + math.exp(1 - abs(bar)))
        assert found.terms["policy"].value[step].item() == pytest.approx(-wanted, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 1.5])
def test_extrapolation_between_two_that_rule_tokens_out(weight: float) -> None:
    """Teacher, base, both, neither: lambda log p_T + (1 - lambda) log p_B - log p_S, with teacher before base."""
    tokens = torch.zeros(4, dtype=torch.long)
    teacher = Sampled(tokens, logp_N=torch.tensor([-math.inf, -1.0, -math.inf, -1.0], dtype=F64))
    base = Sampled(tokens, logp_N=torch.tensor([-2.0, -math.inf, -math.inf, -2.0], dtype=F64))
    found = (
        token_losses(
            registry.load("gopd", reward_weight=weight, clip=None, truncation=None),
            student_logits=torch.zeros(4, 4, dtype=F64),
            teacher_logits=teacher,
            tokens=tokens,
            extra_views={} if weight == 1.0 else {"base": base},
        )
        .terms["reverse"]
        .value
    )
    assert not found.isnan().any()
    assert found[3].item() == pytest.approx(-(weight * -1.0 + (1 - weight) * -2.0 + math.log(4.0)))


@pytest.mark.parametrize("top_k", [1, 0, -1])
def test_vopd_refuses_a_baseline_of_nothing(top_k: int) -> None:
    with pytest.raises(UserError, match=rf"method.top_k = {top_k}: .* null for the whole vocabulary"):
        registry.load("vopd", top_k=top_k)


def _numbers(name: str) -> list[str]:
    hints = get_type_hints(registry.builder(name))
    return [key for key, hint in hints.items() if hint is float or float in get_args(hint)]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in _numbers(name)])
def test_every_setting_is_a_number(name: str, key: str) -> None:
    with pytest.raises(UserError, match=f"method.{key} is nan; give a number"):
        registry.load(name, **{key: math.nan})


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "key"),
    [("opd", "coef"), ("opd", "temperature"), ("todi", "sharpness"), ("abkd", "alpha"), ("sdpo", "update_rate")],
)
def test_infinity_is_refused_where_it_means_nothing(name: str, key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"method.{key} = -?inf: it must be finite"):
        registry.load(name, **{key: value})


def test_infinity_where_it_means_something_and_within_a_wrapped_method() -> None:
    assert registry.load("eopd", entropy_threshold=math.inf).settings["entropy_threshold"] == math.inf
    wrapped = registry.load("local_teachability", of="eopd", settings={"entropy_threshold": math.inf})
    assert wrapped.name == "local_teachability"
    for bad, message in ((math.nan, "is nan"), ([1.0, math.nan], "is nan")):
        with pytest.raises(UserError, match=message):
            registry.load("local_teachability", settings={"coef": bad})
    with pytest.raises(UserError, match=r"method.coef = inf"):
        registry.load("local_teachability", settings={"coef": math.inf})


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("gold", {"matched_weight": 0.3}, "matched_weight and unmatched_weight: give both"),
        ("gold", {"matched_weight": 0.3, "unmatched_weight": -1.0}, "matched_weight and unmatched_weight must not"),
        ("gold", {"hybrid": True, "teacher_weight": 1.0}, "teacher_weight must lie"),
        ("bpm", {"divergence": "jsd", "teacher_weight": 1.0}, "teacher_weight must lie .* set divergence=forward_kl"),
        ("uld", {"top_k": 0}, "top_k must be"),
        ("alm", {"tau": 0.5}, "tau must be"),
        ("strict_ct", {"top_k": 0}, "top_k must be"),
        ("skew_kl", {"skew": 1.0}, "skew must be"),
        ("unisd", {"contexts": 10**9}, "contexts must be"),
        ("power_opd", {"power": 0.0}, "power must be"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_a_refused_setting_is_named_and_no_function(name: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^method '{name}': {named}"):
        registry.load(name, **settings)
