"""Settings of a method in groups: the same as single ones, wherever they are given, and never both."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

from retort import config, registry
from retort.config.precedence import merge
from retort.config.toml import overrides
from retort.errors import UserError
from retort.method import Method, Paper, groups_of, method
from retort.methods.opd import opd
from retort.methods.peer_opd import Peers, Ratios, peer_opd
from retort.methods.uni_opd import Balance, Margin, uni_opd
from retort.methods.unisd import Agreement, Contrastive, unisd
from retort.train.given.arguments import refuse_twice

GROUPED = ("mad_opd", "mt_opd", "opad", "peer_opd", "ropd", "uni_opd", "unisd")


@pytest.mark.parametrize("name", registry.names())
def test_few_arguments_are_grouped_and_single_settings_stay(name: str) -> None:
    groups = groups_of(registry.builder(name))
    assert bool(groups.defaults) == (name in GROUPED)
    assert groups.gathered(registry.defaults(name)).keys() == inspect.signature(groups.build).parameters.keys()
    assert len(inspect.signature(groups.build).parameters) <= (10 if name in GROUPED else 15)


def test_the_single_settings_are_those_that_there_were() -> None:
    words = "preset teacher_weight agreement spread contexts demonstrations gamma divided_by update_rate update_every "
    words += "context instruction_tokens "
    words += "contrastive_coef contrastive_margin matching_coef divergence_coef cap cap_quantile samples temperature"
    assert set(registry.defaults("unisd")) == set(words.split())
    words = "successes failures failure_when threshold feedback thoughts choice divergence teacher_weight top_k tail "
    words += "reduction teacher update_rate ratio_cap truncation samples temperature summaries summary summary_tokens"
    assert set(registry.defaults("peer_opd")) == set(words.split())
    words = "balance balance_scope calibration margin margin_gap margin_scope margin_direction margin_retained "
    words += "margin_over gap_limit clip_low clip_high success_threshold reduction difficulty samples temperature"
    assert set(registry.defaults("uni_opd")) == set(words.split())


@pytest.mark.parametrize(
    ("grouped", "name", "single"),
    [
        (unisd(agreement=Agreement("token", gamma=0.5)), "unisd", {"agreement": "token", "gamma": 0.5}),
        (unisd(contrastive=Contrastive(coef=0.2)), "unisd", {"contrastive_coef": 0.2}),
        (peer_opd(peers=Peers(failures=0), samples=4), "peer_opd", {"failures": 0, "samples": 4}),
        (peer_opd(ratios=Ratios(student=None)), "peer_opd", {"ratio_cap": None}),
        (uni_opd(balance=Balance(None)), "uni_opd", {"balance": None}),
        (uni_opd(margin=Margin(0.1, scope="batch")), "uni_opd", {"margin": 0.1, "margin_scope": "batch"}),
    ],
    ids=["agreement", "contrastive", "peers", "ratios", "balance", "margin"],
)
def test_a_group_says_the_same_as_its_settings(grouped: Method, name: str, single: dict[str, Any]) -> None:
    assert dict(grouped.settings) == dict(registry.load(name, **single).settings)
    assert dict(grouped.settings) == registry.defaults(name) | single


def test_a_group_is_its_dataclass_or_a_table() -> None:
    found = registry.load("unisd", agreement={"level": "token", "gamma": 0.5})
    assert found.settings == registry.load("unisd", agreement=Agreement("token", gamma=0.5)).settings
    wrapped = {"of": "unisd", "settings": {"preset": "contrastive", "divergence": {"coef": 0.0}}}
    assert [term.name for term in registry.load("local_teachability", **wrapped).terms] == ["contrastive"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "unisd",
            {"agreement": {"gamma": 0.1}, "gamma": 0.2},
            "method.gamma is given twice, by itself and in method.agreement; leave one of them out",
        ),
        ("unisd", {"agreement": Agreement(), "contexts": 4}, "method.contexts is given twice"),
        ("unisd", {"agreement": {"gama": 0.1}}, "method.agreement has no setting 'gama'; did you mean 'gamma'?"),
        ("unisd", {"teacher": 0.1}, r"method.teacher is a group: give a table .* \(rate, every\), not 0.1"),
        ("unisd", {"agreement": {"gamma": "much"}}, "method.gamma: .* number"),
        ("unisd", {"agreement": Agreement(gamma=float("nan"))}, "method.gamma is nan; give a number"),
        ("uni_opd", {"clip": {"low": True}}, "method.clip_low is true; give a number"),
        ("uni_opd", {"margin": "wide"}, "method.margin: .* number"),
        ("unisd", {"gama": 0.1}, "method 'unisd' has no setting 'gama'; did you mean 'gamma'?"),
        ("local_teachability", {"of": "unisd", "settings": {"teacher": {"pace": 1}}}, "has no setting 'pace'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_group_is_said_in_one_line(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        registry.load(name, **settings)
    assert "\n" not in str(found.value)


@dataclass(frozen=True)
class Pair:
    """Two numbers."""

    one: float = 1.0
    two: float = 2.0


def test_two_settings_of_one_name_are_refused() -> None:
    def in_two_groups(*, a: Pair = Pair(), b: Pair = Pair()) -> Method:
        return opd(coef=a.one + b.one)

    def beside_a_group(*, a: Pair = Pair(), two: float = 1.0) -> Method:
        return opd(coef=a.one + two)

    def named_like_a_setting_of_another(*, a: Pair = Pair(), one: Average = Average()) -> Method:
        return opd(coef=a.one + one.mean)

    mark = method(paper=Paper("t", "a", 2026), status="faithful")
    for build, twice in ((in_two_groups, "one"), (beside_a_group, "two"), (named_like_a_setting_of_another, "one")):
        with pytest.raises(TypeError, match=f"{build.__name__} has two settings called {twice}"):
            mark(build)


@dataclass(frozen=True)
class Average:
    """A number."""

    mean: float = 1.0


def test_a_table_of_a_configuration_file_is_stored_as_single_settings() -> None:
    file = {"method": {"name": "unisd", "agreement": {"level": "token", "gamma": 0.5}}}
    stored = config.resolve(file).method
    assert stored == {"name": "unisd", **registry.load("unisd", agreement="token", gamma=0.5).settings}
    assert config.resolve({"method": stored}).method == stored


def test_later_layers_win_however_they_say_it() -> None:
    grouped, single = {"agreement": {"level": "token", "gamma": 0.5}}, overrides(["method.gamma=0.25"])
    for layers in (
        ({"method": {"name": "unisd", **grouped}}, single),
        ({"method": grouped}, {"method": "unisd"}, single),
        ({"method": {"name": "unisd", "gamma": 0.25}}, {"method": {"agreement": {"level": "token"}}}),
        ({"method": "unisd"}, {"method": grouped}, overrides(["method.agreement.gamma=0.25"])),
    ):
        found = config.resolve(*layers).method
        assert (found["agreement"], found["gamma"]) == ("token", 0.25)


def test_another_method_takes_over_the_settings_that_it_knows() -> None:
    below = {"method": {"name": "unisd", "teacher": {"rate": 0.1}, "samples": 2}}
    assert merge(below, {"method": "peer_opd"})["method"] == {"name": "peer_opd", "update_rate": 0.1, "samples": 2}


def test_what_an_argument_and_the_settings_say_differently_is_refused() -> None:
    flags = {"method": {"name": "unisd", "gamma": 0.5}}
    refuse_twice(flags, None, {"method": {"agreement": {"gamma": 0.5}}})
    with pytest.raises(UserError, match="method.gamma is given twice, as an argument"):
        refuse_twice(flags, None, {"method": {"agreement": {"gamma": 0.25}}})


def test_every_setting_of_a_group_is_described() -> None:
    for name in GROUPED:
        described = registry.described(name)
        assert described.keys() == registry.defaults(name).keys()
        assert all(described.values())
