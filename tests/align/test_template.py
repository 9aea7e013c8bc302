"""Prompts put into a template: the repair by a teacher's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.core.rollouts import Message, Prompt
from retort.data import in_template
from retort.errors import UserError
from retort.train import runner


def test_the_last_turn_is_put_into_it() -> None:
    before = Message("system", "Be {brief}.")
    prompts = [Prompt("a", (before, Message("user", "1 + {prompt}"))), Prompt("b", (Message("user", "2"),))]
    found = in_template(prompts, "{prompt}\nReason, and box it: \\boxed{x}.")
    assert found[0].messages == (before, Message("user", "1 + {prompt}\nReason, and box it: \\boxed{x}."))
    assert found[1].text == "2\nReason, and box it: \\boxed{x}."
    assert [prompt.id for prompt in found] == ["a", "b"]


@pytest.mark.parametrize("template", ["", "no place", "{prompt} {prompt}"])
def test_a_template_has_one_place(template: str) -> None:
    with pytest.raises(UserError, match="it must hold {prompt} once"):
        in_template([Prompt("a", (Message("user", "x"),))], template)


def test_a_run_trains_and_judges_in_it(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = configuration.merge(tiny_run, {"prompt_template": "3 {prompt} 7"})
    plain = runner.start(configuration.resolve(tiny_run), tmp_path / "plain").prepared
    put = runner.start(configuration.resolve(settings), tmp_path / "put").prepared
    for mine, theirs in ((put.source.prompts, plain.source.prompts), (put.held_out, plain.held_out)):
        assert [prompt.text for prompt in mine] == [f"3 {prompt.text} 7" for prompt in theirs]
        assert len(mine) > 0
    assert put.source.render(put.source.prompts[0]).ids != plain.source.render(plain.source.prompts[0]).ids


def test_the_built_in_task_has_its_own_words() -> None:
    config = configuration.resolve(configuration.recipe("countdown"), {"prompt_template": "{prompt}!"})
    from retort.train.setup.prepare import prepare

    with pytest.raises(UserError, match="prompt_template is for data of your own"):
        prepare(config)
