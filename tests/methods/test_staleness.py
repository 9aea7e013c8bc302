"""Which methods may learn from batches that an older student wrote, and why; a new method is a line of the table."""

from __future__ import annotations

from typing import Any

import pytest

from retort import Method, Term, load
from retort import config as configuration
from retort.controllers.lengths import length_stages
from retort.divergences import k2, k3
from retort.errors import UserError
from retort.estimators import pathwise
from retort.methods._cold_start import with_cold_start
from retort.methods._engine import corrected_for_engine, uncorrected
from retort.registry import names
from retort.rollout.plan import RolloutPlan
from retort.train.setup.staleness import check_staleness

#: A divergence in closed form is right at every prefix, whoever wrote it; also where its weights follow the token.
CLOSED = (
    *("abkd", "akl", "alm", "arkd", "bpm", "decoupled_kl", "dopd", "gkd", "gold", "mad_opd", "mt_opd", "opad", "opsd"),
    *("pw_opsd", "sdft", "sead", "simct", "simple_ctkd", "skew_kl", "strict_ct", "temperature", "todi", "topk_kl"),
    *("topk_score", "uld", "unisd", "va_opd", "w2s_opd"),
)
#: Policy gradients: min(p_old / p_engine, 2) at each token, beside weights of their own.
WEIGHED = (
    *("atod", "cl_egrsd", "dasd", "egrsd", "eopd", "ida_opd", "lgr", "local_teachability", "opct", "opd", "opd2"),
    *("power_opd", "reopd", "rlsd", "sod", "tcod", "topd", "tropd", "uni_opd", "vopd"),
)
#: They correct for whoever wrote by themselves.
BY_THEMSELVES = ("exopd", "gopd", "listopd", "peer_opd", "sdpo")
REFUSED = {
    "resopd": r"'tail_residual\(teacher top-4\)' \(term 'residual'\) is right only for tokens that the student drew as",
    "ropd": "a judge grades its rollouts by answers that models of this process write",
    "flow_opd": "its student decides denoising steps, which are made in this process",
    "diffusion_opd": "its student decides denoising steps, which are made in this process",
}


def check(method: Method, **rollout: Any) -> None:
    own = {"staleness": 1, "engine": "vllm", "vllm_python": "python", **rollout}
    check_staleness(configuration.Config.model_validate({"rollout": own}), method)


def test_every_method_is_in_the_table_once() -> None:
    assert sorted([*CLOSED, *WEIGHED, *BY_THEMSELVES, *REFUSED]) == names()


@pytest.mark.parametrize("name", names())
def test_a_method_is_weighed_as_it_has_to_be_or_refused(name: str) -> None:
    method = load(name)
    corrected = corrected_for_engine(method)
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"method '{name}' cannot learn from batches .*: {REFUSED[name]}"):
            check(corrected)
        return
    check(corrected)
    assert uncorrected(corrected) is None
    assert (corrected.terms != method.terms) == (name in WEIGHED)
    policy_gradients = [term for term in corrected.terms if term.estimator.uses_old_logp]
    assert all(term.weight is not None and term.weight.corrects_engine for term in policy_gradients)
    assert bool(policy_gradients) == (name in (*WEIGHED, "exopd", "gopd", "listopd"))
    if name in WEIGHED:
        with pytest.raises(UserError, match="is a policy gradient, and rollout.correction=none does not weigh it"):
            check(method, correction="none")
    else:
        check(method, correction="none")


def test_settings_of_a_method_decide() -> None:
    check(corrected_for_engine(load("resopd", top_k=0)))  # it is `opd`
    check(load("sdft", generate_from_teacher=True))  # a divergence in closed form, under whatever prompt it is written
    with pytest.raises(UserError, match="the teacher writes some of its completions"):
        check(load("decoupled_kl", prefix="teacher"))


@pytest.mark.parametrize("divergence", [k2(), k3()], ids=["k2", "k3"])
def test_an_estimate_from_the_sampled_token_is_refused(divergence: Any) -> None:
    method = Method(name="mine", rollout=RolloutPlan(), terms=(Term("estimate", pathwise(divergence)),))
    with pytest.raises(UserError, match=rf"method 'mine' .*'{divergence.name}' \(term 'estimate'\) is right only"):
        check(method)


def test_what_needs_the_student_between_two_batches_is_refused() -> None:
    grows = length_stages([4, 16])
    plan = RolloutPlan(horizon=grows.read("horizon"))
    method = Method(name="mine", rollout=plan, terms=load("gkd").terms, controllers=(grows,))
    with pytest.raises(UserError, match="the probe of its controller '.*' has the student write between two batches"):
        check(method)


@pytest.mark.parametrize(("name", "reason"), [("sead", "measured when a cold start is over"), ("skew_kl", "not known")])
def test_plans_that_a_cold_start_would_have_to_know_are_refused(name: str, reason: str) -> None:
    check(load(name))
    with pytest.raises(UserError, match=f"method '{name}' cannot .*{reason}"):
        check(with_cold_start(load(name), 2, answers="dataset"))
    with pytest.raises(UserError, match="the teacher writes some of its completions"):
        check(with_cold_start(load(name), 2, answers="teacher"))


def test_the_loop_in_this_process_is_refused() -> None:
    with pytest.raises(
        UserError, match="rollout.staleness=1 needs an engine with weights of its own, and .*engine=own"
    ):
        check(load("gkd"), engine="own", vllm_python=None)
