"""Runs in which no teacher has anything to show are refused, and words that a teacher does not know are noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
from imaged import reads_images

from retort import api, registry
from retort import config as configuration
from retort.errors import UserError
from retort.tasks.coached import TEMPLATES
from retort.teachers.templates import TEMPLATES as ALL
from retort.teachers.view_input import Stage
from retort.train.models.models import local_teacher
from retort.train.setup.contexts import need_context
from retort.train.setup.prepare import Prepared, prepare

pytestmark = pytest.mark.usefixtures("models_kept")


def prepared(settings: dict[str, Any], **method: Any) -> Prepared:
    bare = pipeline.for_method(settings, registry.load(**method))
    return prepare(api.assemble({**bare, "method": method}))


def coached(data: str, **method: Any) -> Prepared:
    small = {"data": data, "eval": {"problems": 0}, "steps": 2}
    more = pipeline.for_method({"student": "coached:student"}, registry.load(**method)).get("models", {})
    return prepare(api.assemble({**small, "method": method, **({"models": more} if more else {})}))


@pytest.mark.parametrize("name", ["sdpo", "peer_opd"])
@pytest.mark.parametrize("feedback", ["never", "without_success", "always"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_run_that_could_never_learn_is_refused(name: str, feedback: str, samples: int) -> None:
    settings = {"name": name, "samples": samples, "feedback": feedback}
    if samples == 1 and feedback == "never":
        with pytest.raises(UserError, match=r"nothing to show its teacher \(view 'teacher'\).*samples = 1"):
            coached("coached", **settings)
    else:
        assert coached("coached", **settings).method.name == name


def test_siblings_that_are_never_shown(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nothing would be learnt"):  # this verifier says nothing of what is wrong
        prepared(tiny_run, name="peer_opd", successes=0, failures=0, feedback="always", samples=4)
    prepared(tiny_run, name="peer_opd", successes=0, failures=1, failure_when="without_success", samples=2)
    prepared(tiny_run, name="peer_opd", choice="random", samples=2)


def test_a_loss_of_nothing_is_refused_and_a_term_of_nothing_is_noted(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="all terms of method 'opd' have the coefficient 0"):
        prepared(tiny_run, name="opd", coef=0.0)
    setup = coached("coached", name="unisd", preset="contrastive")
    notes: list[str] = []
    stage = Stage(pool=setup.source.prompts[:1])
    agreeing = registry.load("unisd", preset="star")  # other problems as examples, of which there are none
    need_context(agreeing, setup.source.grader, stage, notes)
    assert any("term 'divergence'" in note and "view 'context_0'" in note for note in notes)
    alone = registry.load("unisd", preset="token_agreement")
    with pytest.raises(UserError, match="1 training prompts"):
        need_context(alone, setup.source.grader, stage, notes)


def test_the_tasks_replace_every_template() -> None:
    judges = {"rubric", "verdicts"}  # what they read, no model of a task does
    assert TEMPLATES.keys() == ALL.keys() - judges
    for name in ("coached", "bait"):
        assert configuration.recipe(name)["templates"] == dict(TEMPLATES)


def _renders(name: str) -> bool:
    return any(view.render is not None for view in registry.load(name).views.values())


@pytest.mark.parametrize("name", [name for name in registry.names() if _renders(name) and not reads_images(name)])
def test_no_view_of_the_built_in_tasks_holds_an_unknown_word(name: str) -> None:
    assert not [note for note in coached("bait", name=name).notes if "does not know" in note]


def test_unknown_words_are_noted_with_the_templates_that_hold_them(
    tiny_run: dict[str, Any], model_folder: Callable[..., Path]
) -> None:
    noted = [note for note in prepared(tiny_run, name="pw_opsd").notes if "does not know" in note]
    assert len(noted) == 1
    assert "view 'teacher'" in noted[0]
    assert "templates.closing, templates.solution in words" in noted[0]
    words = {"solution": "the answer {text}", "closing": "so", "frame": "{prompt} {sections} {closing}"}
    known = prepared({**tiny_run, "templates": words}, name="pw_opsd")
    assert not [note for note in known.notes if "does not know" in note]
    assert not [note for note in prepared(tiny_run, name="opd").notes if "does not know" in note]


@pytest.mark.parametrize("name", ["opsd", "pw_opsd"])
def test_views_without_room_are_refused_or_noted(tiny_run: dict[str, Any], name: str) -> None:
    def with_room(tokens: int) -> Prepared:
        rollout = {**tiny_run["rollout"], "max_view_tokens": tokens}
        return prepared({**tiny_run, "rollout": rollout}, name=name)

    with pytest.raises(UserError, match=r"view 'teacher' has no room for a single character.*max_view_tokens is 4"):
        with_room(4)
    assert not [note for note in with_room(128).notes if "no room" in note]


def test_what_is_cut_to_nothing_counts_as_cut(tiny_run: dict[str, Any]) -> None:
    setup = prepared(tiny_run, name="opsd")
    pack = pipeline.ragged(setup)
    tight = local_teacher(setup.config, setup.student, setup.student).on(Stage(longest=4))
    found = tight.prompts(pack, setup.method.views["teacher"])
    assert found.counts["cut"] == found.counts["no_context"] == len(pack.rollouts)
