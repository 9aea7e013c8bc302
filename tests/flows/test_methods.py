"""What every published method of denoising steps promises, as its siblings for tokens do."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest
import torch
from flows.batch import Flow, velocity
from toy import Toy

import retort.flows.methods
from retort import registry
from retort.errors import UserError
from retort.flows import METHODS, flow_opd
from retort.functional import flow_losses

NAMES = sorted(METHODS)
BEFORE = doctest.script_from_examples(retort.flows.methods.__doc__ or "")
LIMITS = [(name, place) for name in NAMES for place in range(len(METHODS[name]().limits))]


@pytest.mark.parametrize(("name", "place"), LIMITS)
def test_limits_hold_in_value_and_gradient(name: str, place: int) -> None:
    limit = METHODS[name]().limits[place]
    other, settings = limit.equals
    flow = Flow()
    ours = flow.losses(METHODS[name](**limit.settings))
    made = METHODS[other](**settings) if other in METHODS else registry.load(other, **settings)
    theirs = flow.losses(made)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(flow.gradient(ours), flow.gradient(theirs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_a_teacher(name: str) -> None:
    flow = Flow()
    losses = flow.losses(METHODS[name]())
    assert torch.autograd.grad(losses.loss, tuple(flow.others.values()), allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("gradient", ["direct_kl", "sampled_log_ratio", "paper_detached"])
def test_no_gradient_reaches_a_teacher_or_an_anchor(gradient: str) -> None:
    flow = Flow()
    losses = flow.losses(flow_opd(gradient=gradient, anchor_coef=0.1))  # type: ignore[arg-type]
    assert torch.autograd.grad(losses.loss, tuple(flow.others.values()), allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter_and_micro_batches_add_up(name: str) -> None:
    flow = Flow()
    order = torch.randperm(len(flow.latents), generator=torch.Generator().manual_seed(1))

    def of(rows: torch.Tensor) -> torch.Tensor:
        student, teacher = (velocity(own, flow.latents[rows]) for own in (flow.weights, flow.others["teacher"]))
        return flow_losses(
            name,
            student_velocity=student,
            teacher_velocity=teacher,
            latents=flow.latents[rows],
            next_latents=flow.next_latents[rows],
            sigmas=flow.sigmas[rows],
            next_sigmas=flow.next_sigmas[rows],
            noise_level=0.6,
        ).loss

    whole = of(torch.arange(len(order)))
    torch.testing.assert_close(of(order), whole, rtol=1e-12, atol=1e-13)
    halves = [of(half) * len(half) / len(order) for half in (order[:7], order[7:])]
    torch.testing.assert_close(torch.stack(halves).sum(), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_one_file_one_function_all_defaults_and_all_documented(name: str) -> None:
    build = METHODS[name]
    assert build.__name__ == name
    documented = re.findall(r"^ {4}(\w+): ", (inspect.getdoc(build) or "").partition("\nArgs:\n")[2], re.MULTILINE)
    for parameter in inspect.signature(build).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.name in documented
    made = build()
    assert made.paper is not None and made.summary.endswith(".") and made.name == name and made.as_published
    assert len(inspect.getsource(inspect.getmodule(build)).splitlines()) <= 120  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_in_the_docstring_is_right(name: str) -> None:
    found = doctest.DocTestParser().get_examples(METHODS[name].__doc__ or "", name)
    assert any(name in example.source for example in found) and any(re.search(r"\d", one.want) for one in found)
    names: dict[str, object] = {}
    exec(BEFORE, names)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(doctest.DocTest(found, names, name, None, 0, None), out=said.append)
    assert "".join(said) == ""


@pytest.mark.parametrize("gradient", ["direct_kl", "sampled_log_ratio", "paper_detached"])
def test_a_teacher_of_tokens_is_refused_by_name(gradient: str) -> None:
    made = flow_opd(gradient=gradient)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'flow_opd' needs mean and standard deviation of the next latent") as caught:
        Toy().losses(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_says_in_one_line_that_it_trains_no_flow_model(name: str) -> None:
    assert name not in registry.names()
    with pytest.raises(UserError, match=f"method '{name}' teaches denoising steps, which no run trains yet") as caught:
        registry.load(name)
    assert "flow_losses" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "direct"}, "method.gradient: no 'direct'; did you mean 'direct_kl'"),
        ({"scale": 0.0}, "method.scale must be positive"),
        ({"anchor_coef": -0.1}, "anchor_coef at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        flow_opd(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
