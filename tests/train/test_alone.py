"""A method that compares the completions of one prompt is not trained on single ones."""

from __future__ import annotations

from typing import Any

import pipeline
import pytest

from retort import config as configuration
from retort import registry
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.rewards.verify import ExactVerifier
from retort.train.setup.prepare import prepare


def settings(tiny_run: dict[str, Any], name: str, **given: Any) -> configuration.Config:
    bare = pipeline.for_method(tiny_run, registry.load(name, **given))
    return configuration.resolve(configuration.merge(bare, {"method": {"name": name, **given}}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rlsd", "compares the completions of one prompt .* with samples = 1"),
        ("dasd", "compares the completions of one prompt .* with samples = 1"),
        ("sdpo", "shows what siblings wrote .* with samples = 1"),
        ("peer_opd", "shows what siblings wrote .* with samples = 1"),
    ],
)
def test_one_answer_a_prompt_is_refused_in_one_line(name: str, message: str, tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(settings(tiny_run, name, samples=1))
    assert "\n" not in str(caught.value)
    assert "method.samples" in str(caught.value)


def test_feedback_alone_is_something_to_show(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def feedback(self: ExactVerifier, prompt: Prompt, text: str) -> str:
        return "wrong"

    monkeypatch.setattr(ExactVerifier, "feedback", feedback, raising=False)
    assert prepare(settings(tiny_run, "sdpo", samples=1)).method.rollout.samples == 1


def test_a_running_baseline_needs_no_siblings(tiny_run: dict[str, Any]) -> None:
    assert prepare(settings(tiny_run, "egrsd")).method.rollout.samples == 1
