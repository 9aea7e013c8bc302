"""Arguments of `retort.distill` and `retort.doctor`: none is lost, and none is anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from retort.errors import UserError
from retort.train.given.arguments import refuse_twice
from retort.train.surroundings import ordinary


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"method": 5}, "method = 5: give a name, a mapping with name and settings, or a retort.Method"),
        ({"method": ["gkd"]}, r"method = \['gkd'\]: give a name"),
        ({"method": retort.load}, "method = <function load.*; call it, and give what it returns"),
        ({"method": json}, "method = <module 'json'.*: give a name"),
        ({"method": retort.Method}, "method = <class.*: give a name"),
        ({"settings": "lr=3"}, "settings = 'lr=3': give a mapping, nested as in a TOML file"),
        ({"settings": [("steps", 3)]}, "settings = .*: give a mapping"),
        ({"settings": {1: 2}}, "settings: 1 is no name of a setting"),
        ({"settings": {"eval": 3}, "eval_data": [{"prompt": "1"}]}, "eval"),
        ({"data": ""}, "data = '': give a path or a name"),
        ({"eval_data": " "}, "eval_data = ' ': give a path or a name"),
        ({"student": ""}, "student = '': give a path or a name"),
    ],
)
def test_an_argument_of_another_kind_is_one_line(given: dict[str, Any], complaint: str) -> None:
    for function in (retort.distill, retort.doctor):
        with pytest.raises(UserError, match=complaint) as caught:
            function(**given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"resume": 5}, "resume = 5: give a path"),
        ({"resume": ""}, "resume = '': give a path"),
        ({"out": 5}, "out = 5: give a path"),
        ({"out": ""}, "out = '': give a path"),
        ({"steps": 1, "settings": {"steps": 2}}, r"steps is given twice, as an argument \(1\) and in settings \(2\)"),
        ({"verifier": "math", "settings": {"task": "exact"}}, r"verifier is given twice.*'math'.*'exact'"),
    ],
)
def test_a_run_does_not_begin_with_an_argument_that_says_nothing_or_two_things(
    given: dict[str, Any], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        retort.distill(**given)
    assert not list(tmp_path.iterdir())


OPD = {"name": "opd", "samples": 2}


@pytest.mark.parametrize(
    ("flags", "settings", "named"),
    [
        ({"steps": 1}, {"steps": 2}, "steps"),
        ({"seed": 3}, {"seed": 7}, "seed"),
        ({"seed": 3}, {"seed": None}, "seed"),
        ({"student": "in memory: student"}, {"student": "mine"}, "student"),
        ({"eval.data": "a.jsonl"}, {"eval": {"data": "b.jsonl"}}, "eval_data"),
        ({"task": "in memory: <lambda>"}, {"task": "math"}, "verifier"),
        ({"out": "one"}, {"out": "two"}, "out"),
        ({"method": OPD}, {"method": "vopd"}, "method"),
        ({"method": OPD}, {"method": {"name": "vopd"}}, "method"),
        ({"method": OPD}, {"method": {"samples": 4}}, "method.samples"),
    ],
)
def test_an_argument_and_a_setting_that_differ_are_refused(
    flags: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=f"^{named} is given twice, as an argument .* and in settings"):
        refuse_twice(flags, None, settings)


def test_a_method_that_is_an_object_has_its_settings_in_it() -> None:
    own = retort.load("opd", samples=2)
    refuse_twice({}, own, {"method": "opd"})
    refuse_twice({}, own, {"method": {"name": "opd", "samples": 2}, "steps": 3})
    for settings, complaint in [
        ({"name": "vopd"}, "method is given twice"),
        ({"samples": 4}, "method.samples is given twice"),
        ({"entropy_threshold": 0.5}, "given as an object, which has no 'entropy_threshold'"),
    ]:
        with pytest.raises(UserError, match=complaint):
            refuse_twice({}, own, {"method": settings})


def test_what_an_argument_and_a_setting_say_alike_is_said_once() -> None:
    flags = {"steps": "2", "seed": 3, "data": "a.jsonl", "eval.data": "b.jsonl", "method": OPD}
    refuse_twice(flags, None, {"steps": 2, "seed": 3, "data": Path("a.jsonl"), "eval": {"data": "b.jsonl", "every": 1}})
    refuse_twice(flags, None, {"method": {**OPD, "coef": 1.0}, "limit": 3})
    refuse_twice(flags, None, {"method": "opd"})
    refuse_twice({"steps": "2"}, None, {})


def test_a_run_is_among_itself_whatever_torch_was_set_to() -> None:
    def state() -> tuple[Any, ...]:
        made = torch.zeros(1)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            made.dtype,
            made.device.type,
            (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
        )

    plain = state()
    dtype = torch.get_default_dtype()
    for odd in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")):
        with odd():
            before = state()
            assert before != plain
            with ordinary():
                assert state() == plain
            assert state() == before
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(ZeroDivisionError), ordinary():
            assert state() == plain
            raise ZeroDivisionError
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(dtype)


def test_a_run_within_inference_mode_and_in_double_has_the_same_numbers(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny_run, "steps": 1, "eval": {"problems": 0}, "checkpoint": {"every": 0}}
    dtype, losses = torch.get_default_dtype(), []
    try:
        for wanted in (dtype, torch.float64):
            torch.set_default_dtype(wanted)
            with torch.inference_mode(wanted != dtype):
                run = retort.distill(settings=settings, method="opd", out=tmp_path / str(wanted), quiet=True)
            losses.append({name: run.metrics[0][name] for name in ("loss", "reverse_kl", "tokens")})
    finally:
        torch.set_default_dtype(dtype)
    assert losses[0] == losses[1]
