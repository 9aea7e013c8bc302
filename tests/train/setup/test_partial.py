"""What a budget of tokens a batch is refused for, each in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from retort import Method, Term, load
from retort import config as configuration
from retort.core.images import PromptImage
from retort.core.messages import Message
from retort.core.rollouts import Prompt
from retort.divergences import k3
from retort.errors import UserError
from retort.estimators import pathwise
from retort.methods._cold_start import with_cold_start
from retort.models.images import made_up
from retort.registry import names
from retort.rollout.plan import Replay, RolloutPlan
from retort.train.setup.partial import check_partial, partial_of, refuse_images
from retort.train.setup.prepare import run_method
from retort.train.setup.staleness import generates_older_tokens
from retort.train.source.partial import Dropped, Resumed, Waited


def config_of(kind: str = "resume", **rollout: Any) -> configuration.Config:
    own = {"partial": kind, "segment_tokens": 64, "max_new_tokens": 256, **rollout}
    return configuration.Config.model_validate({"rollout": own})


def check(method: Method, kind: str = "resume", **rollout: Any) -> None:
    check_partial(config_of(kind, **rollout), method)


SETTINGS = {
    "tokens without a use for them": (
        {"kind": "wait"},
        r"rollout.segment_tokens=64 belongs to rollout.partial=drop or resume, and it is wait",
    ),
    "no tokens": ({"segment_tokens": None}, r"rollout.partial=resume needs rollout.segment_tokens"),
    "none to drop after": ({"kind": "drop", "segment_tokens": None}, r"rollout.partial=drop needs rollout.segment"),
    "as many as the longest has": (
        {"segment_tokens": 256},
        r"rollout.segment_tokens=256 must be less than rollout.max_new_tokens=256, or it stops no completion",
    ),
    "an environment": ({"kind": "drop", "env": "rooms"}, r"rollout.partial=drop .* environment 'rooms' replies"),
    "no correction": ({"correction": "none"}, "method 'opd' cannot .*: its term '.*' is a policy gradient, and roll"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused(case: str) -> None:
    rollout, words = SETTINGS[case]
    with pytest.raises(UserError, match=words):
        check(load("opd"), **rollout)


def test_a_longest_completion_that_was_made_to_fit_is_looked_at_again() -> None:
    fitted = config_of().changed("rollout.max_new_tokens", 60)
    with pytest.raises(UserError, match="must be less than rollout.max_new_tokens=60"):
        partial_of(fitted)


def test_each_kind_has_who_sees_to_it() -> None:
    assert isinstance(partial_of(configuration.Config()), Waited)
    found = [partial_of(config_of(kind)) for kind in ("drop", "resume")]
    assert [type(own) for own in found] == [Dropped, Resumed]
    assert [own.words for own in found] == [
        "a completion that has not ended after 64 tokens is dropped",
        "a completion that has not ended after 64 tokens of a batch goes on in the next one",
    ]


#: Methods whose completions cannot go on with newer weights, and why; all others can.
REFUSED = {
    "resopd": "is right only for tokens that the student drew as it is",
    "sead": "it orders prompts by how hard they are",
    "skew_kl": "it replays earlier batches",
    "flow_opd": "its student decides denoising steps",
    "diffusion_opd": "its student decides denoising steps",
}


@pytest.mark.parametrize("name", names())
def test_methods_whose_estimator_or_plan_forbids_it_are_refused(name: str) -> None:
    if name == "arkd":
        for kind in ("drop", "resume"):
            with pytest.raises(UserError, match="completions of the student, which generates none for method 'arkd'"):
                check(load(name), kind)
        return
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"method '{name}' cannot learn from completions that.*{REFUSED[name]}"):
            check(load(name))
        return
    check(load(name))
    check(load(name), "drop")


def test_plans_are_refused() -> None:
    terms = load("gkd").terms
    student = Method(name="mine", rollout=RolloutPlan(), terms=terms)
    replays = Method(name="mine", rollout=RolloutPlan(replay=Replay(capacity=3)), terms=terms)
    estimate = Method(name="mine", rollout=RolloutPlan(), terms=(Term("estimate", pathwise(k3())),))
    alone = Method(name="mine", rollout=RolloutPlan(on_policy_fraction=0.0), terms=terms)
    for method, words in ((replays, "it replays"), (estimate, "'k3'.* is right only for tokens that the student drew")):
        with pytest.raises(UserError, match=words):
            check(method)
        check(method, "drop")
    for kind in ("drop", "resume"):
        with pytest.raises(UserError, match="is about completions of the student, which generates none for method"):
            check(alone, kind)
    check(with_cold_start(student, 2, answers="teacher"))
    with pytest.raises(UserError, match="its student generates, before another method takes over"):
        check(replace(student, before=(2, student)))
    with pytest.raises(UserError, match="reads the prompt of view"):
        check(load("sdft", generate_from_teacher=True))


def test_what_goes_on_is_corrected_for_older_weights() -> None:
    settings = {"rollout": {"partial": "resume", "segment_tokens": 8}, "method": {"name": "opd"}}
    resumed, dropped = (
        configuration.Config.model_validate(configuration.merge(settings, {"rollout": {"partial": kind}}))
        for kind in ("resume", "drop")
    )
    assert generates_older_tokens(resumed)
    assert not generates_older_tokens(dropped)
    weights = [run_method(config, None).terms[0].weight for config in (resumed, dropped)]
    assert weights[0] is not None
    assert weights[0].corrects_engine
    assert weights[1] is None


def test_images_are_refused_where_completions_go_on() -> None:
    seen = Prompt("row", (Message("user", "what is it?", images=(made_up(8, 8, 0),)),))
    assert isinstance(seen.images[0], PromptImage)
    with pytest.raises(UserError, match="prompt 'row' holds an image, and rollout.partial=resume is for text alone"):
        refuse_images(config_of(), [seen])
    refuse_images(config_of("drop"), [seen])
