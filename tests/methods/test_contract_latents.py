"""What every method that can teach denoising steps promises, as its siblings for tokens do (`test_contract.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flows.batch import GROUPS, REWARDS, Flow, velocity
from methods.test_contract import IN_ORDER, NOT_ZERO, WHOLE_BATCH
from toy import Toy

from retort import registry
from retort.cli import main
from retort.core.gaussian import Gaussian
from retort.core.losses import TokenLosses
from retort.errors import UserError
from retort.loss.latents import check_latents
from retort.loss.terms import check_needs
from retort.method import Method


def _allowed(method: Method) -> bool:
    """Whether it reads nothing that denoising steps do not have."""
    try:
        check_latents(method)
    except UserError:
        return False
    return True


#: All that can teach denoising steps at their default settings, and those of them that can teach nothing else.
NAMES = [name for name in registry.names() if _allowed(registry.load(name))]
ONLY = [name for name in NAMES if registry.load(name).needs_latents]
#: Methods of the sampled log-ratio or of a KL, which must not be lost to a need too many.
ABLE = {"atod", "diffusion_opd", "exopd", "flow_opd", "gopd", "opct", "opd", "rlsd", "sod", "tcod"}
#: Settings of flow_opd in which it does another thing.
GRADIENTS = ("direct_kl", "sampled_log_ratio", "paper_detached")


def losses(flow: Flow, method: Method, **more: Any) -> TokenLosses:
    """The method on all steps, with a model of its own behind each further view."""
    others = {view: flow.others.get(view, flow.others["base"]) for view in method.views if view != "teacher"}
    views = {view: velocity(flow.weights if more.get("same") else own, flow.latents) for view, own in others.items()}
    return flow.losses(method, **{"extra_views": views, **more})


def rows(flow: Flow, name: str, index: torch.Tensor) -> TokenLosses:
    """The method on some of the steps, as one batch."""
    method = registry.load(name)
    latents = flow.latents[index]
    return losses(
        flow,
        method,
        student_velocity=velocity(flow.weights, latents),
        teacher_velocity=velocity(flow.others["teacher"], latents),
        extra_views={view: velocity(flow.others["base"], latents) for view in method.views if view != "teacher"},
        latents=latents,
        next_latents=flow.next_latents[index],
        sigmas=flow.sigmas[index],
        next_sigmas=flow.next_sigmas[index],
        rollouts=flow.rollouts[index],
        groups=GROUPS[flow.rollouts[index]],
        rewards=REWARDS[flow.rollouts[index]],
    )


def test_which_methods_teach_latents_and_which_teach_nothing_else() -> None:
    assert set(NAMES) > ABLE
    assert ONLY == ["diffusion_opd", "flow_opd"]
    assert registry.for_tokens() == [name for name in registry.names() if name not in ONLY]


@pytest.mark.parametrize("name", registry.names())
def test_every_method_teaches_denoising_steps_or_says_why_not(name: str) -> None:
    """What a method reads is said by its parts: whoever passes the check has all that it reads."""
    flow, method = Flow(), registry.load(name)
    try:
        check_latents(method)
    except UserError as error:
        assert "\n" not in str(error) and f"method '{name}' cannot teach denoising steps" in str(error)
        with pytest.raises(UserError, match="cannot teach denoising steps"):
            flow.losses(method)
        return
    found = losses(flow, method)
    gradient = torch.autograd.grad(found.loss, flow.weights, retain_graph=True)[0]
    assert bool(found.loss.isfinite()) and bool(gradient.isfinite().all()) and bool(gradient.any())
    assert torch.autograd.grad(found.loss, tuple(flow.others.values()), allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("name", NAMES)
def test_zero_when_student_equals_teacher(name: str) -> None:
    flow = Flow()
    found = losses(flow, registry.load(name), same=True)
    largest = max(found.loss.abs().item(), flow.gradient(found).abs().max().item())
    assert largest > 1e-6 if name in NOT_ZERO else largest < 1e-12


def both_teach_latents(*both: tuple[str, Mapping[str, Any]]) -> bool:
    """Whether neither side of a limit reads a vocabulary in these settings."""
    return all(_allowed(registry.load(name, **settings)) for name, settings in both)


LIMITS = [
    pytest.param(name, place, id=f"{name}-{place}")
    for name in NAMES
    for place, limit in enumerate(registry.load(name).limits)
    if both_teach_latents((name, limit.settings), limit.equals)
]


@pytest.mark.parametrize(("name", "place"), LIMITS)
def test_limits_hold_in_value_and_gradient(name: str, place: int) -> None:
    limit = registry.load(name).limits[place]
    other, settings = limit.equals
    flow = Flow()
    ours = losses(flow, registry.load(name, **limit.settings))
    theirs = losses(flow, registry.load(other, **settings))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(flow.gradient(ours), flow.gradient(theirs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_gradient_reaches_a_teacher_or_an_anchor(gradient: str) -> None:
    flow = Flow()
    found = flow.losses(registry.load("flow_opd", gradient=gradient, anchor_coef=0.1))
    assert torch.autograd.grad(found.loss, tuple(flow.others.values()), allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter_and_micro_batches_add_up(name: str) -> None:
    flow = Flow()
    count = len(flow.latents)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    if name in IN_ORDER:
        order = torch.cat([(flow.rollouts == rollout).nonzero().squeeze(-1) for rollout in (3, 0, 4, 2, 1)])
    whole = rows(flow, name, torch.arange(count)).loss
    torch.testing.assert_close(rows(flow, name, order).loss, whole, rtol=1e-12, atol=1e-13)
    if name in WHOLE_BATCH:
        return
    halves = (torch.arange(7), torch.arange(7, count))
    parts = [rows(flow, name, half).loss * len(half) / count for half in halves]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_of_gaussians_serves_it(name: str) -> None:
    """Whatever needs no vocabulary needs no more of a teacher than a policy over latents gives."""
    method = registry.load(name)
    check_needs(method, dict.fromkeys(method.views, frozenset(Gaussian.offers)))


MADE: Mapping[str, Callable[[], Method]] = {
    "diffusion_opd": lambda: registry.load("diffusion_opd"),
    **{own: (lambda own=own: registry.load("flow_opd", gradient=own)) for own in GRADIENTS},
}


@pytest.mark.parametrize("name", MADE)
def test_steps_that_decide_tokens_are_refused(name: str) -> None:
    """By the need of the method, as any other need that a teacher does not meet."""
    method = MADE[name]()
    with pytest.raises(UserError, match=f"'{method.name}' needs mean and standard deviation of the next") as caught:
        Toy().losses(method)
    assert "\n" not in str(caught.value) and "the student, too, must be a flow model" in str(caught.value)


def test_a_run_on_texts_is_refused_in_one_line(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--{name}={tiny_run[name]}" for name in ("student", "teacher", "data")]
    assert main(["train", "--method", "flow_opd", "--out", "run", *words, "--steps=1", "checks=warn"]) == 2
    (said,) = re.findall(r"^retort: .*$", capsys.readouterr().err, re.MULTILINE)
    assert "'flow_opd' needs mean and standard deviation of the next latent from 'teacher'" in said
    assert "the student, too, must be a flow model: it decides latents, not tokens" in said
    assert "opd" in said.partition("methods that it serves: ")[2].rstrip(")").split(", ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "direct"}, "method.gradient"),
        ({"scale": 0.0}, "method.scale must be positive"),
        ({"anchor_coef": -0.1}, "anchor_coef at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"scale": float("nan")}, "scale"),
    ],
    ids=["gradient", "scale", "anchor", "samples", "nan"],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        registry.load("flow_opd", **settings)
    assert "\n" not in str(caught.value)
