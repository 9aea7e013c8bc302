"""A step on prompts with images, through the pipeline of a run: packs give what one sequence at a time gives.

A method reads rows of a table and signals, so its numbers must not depend on what the prompts hold. These are methods
of all kinds of signals and views, on a random image-text model.
"""

from __future__ import annotations

from typing import Any

import pipeline
import pytest
from imaged import seeing

from retort import registry
from retort.errors import UserError
from retort.evaluate.evaluator import Evaluator
from retort.evaluate.pixelated import CHANGED, ORIGINAL, PIXELATED
from retort.train.models import models
from retort.train.output import record

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("opd", {}),
    ("gkd", {"on_policy_fraction": 1.0}),
    ("eopd", {"top_k": 4}),
    ("opsd", {"shows": ["hint"]}),
    ("sdpo", {"top_k": 4}),
    ("dopd", {"hint": "images", "top_k": 4}),
    ("dopd", {"hint": "hint", "top_k": 4}),
    ("uni_opd", {"margin": 0.0, "margin_direction": "correct_up"}),
    ("va_opd", {}),
]


@pytest.fixture(scope="module")
def seeing_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run on images: two random models, and rows with one image, with two, and with one for a teacher."""
    folder = tmp_path_factory.mktemp("seeing")
    seeing(folder)
    return {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data.jsonl"),
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "warn",
        "steps": 4,
        "rollout": {"prompts": 4, "max_new_tokens": 12, "max_prompt_tokens": 128},
    }


def _named(name: str, given: dict[str, Any]) -> str:
    return "-".join([name, *map(str, given)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in registry.for_tokens() if name != "ropd"])
def test_every_method_learns_from_prompts_with_images(name: str, seeing_run: dict[str, Any]) -> None:
    test_packs_of_image_prompts_give_what_single_sequences_give(name, {}, seeing_run)


def test_a_judge_of_text_is_given_no_prompt_with_an_image(seeing_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="holds an image, which a judge does not see"):
        pipeline.prepared({**seeing_run, "judge": {"model": "teacher"}}, "ropd")


@pytest.mark.parametrize(("name", "given"), METHODS, ids=[_named(*one) + f"-{at}" for at, one in enumerate(METHODS)])
def test_packs_of_image_prompts_give_what_single_sequences_give(
    name: str, given: dict[str, Any], seeing_run: dict[str, Any]
) -> None:
    setup = pipeline.prepared(seeing_run, name, **given)
    pack = pipeline.ragged(setup)
    assert any(sequence.media for sequence in pack.sequences)
    alone = pipeline.as_run(setup, pack, 1)[0]
    together = pipeline.as_run(setup, pack, 10**6)[0]
    largest = max(float(gradient.abs().max()) for gradient in alone.gradients.values())
    assert largest > 0
    assert together.loss == pytest.approx(alone.loss, rel=1e-5, abs=1e-7)
    for parameter, gradient in alone.gradients.items():
        found = together.gradients[parameter]
        assert float((found - gradient).abs().max()) <= 1e-5 * largest, parameter


def test_the_poorer_image_changes_what_the_teacher_says_and_only_where_an_image_is_read(
    seeing_run: dict[str, Any],
) -> None:
    setup = pipeline.prepared(seeing_run, "va_opd")
    batch = pipeline.scored(setup, pipeline.ragged(setup))
    advantage_N, weight_N = batch.steps.stored["visual.advantage"], batch.steps.stored["visual.weight"]
    assert float(advantage_N.min()) == 0.0 < float(advantage_N.max())
    for group in batch.steps.group_N.unique():  # type: ignore[union-attr]
        assert float(weight_N[batch.steps.group_N == group].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "given", "seen"), [("va_opd", {}, False), ("dopd", {"hint": "images"}, True)])
def test_the_record_names_images_of_the_teacher_alone_only_where_a_teacher_sees_them(
    name: str, given: dict[str, Any], seen: bool, seeing_run: dict[str, Any]
) -> None:
    setup = pipeline.prepared(seeing_run, name, **given)
    batch = pipeline.scored(setup, pipeline.ragged(setup))
    rows = record.rows(batch, {}, 1, 9, setup.student.tokenizer)
    assert all(row["images"] for row in rows)
    assert [("teacher_images" in row) for row in rows] == [seen] * len(rows)


@pytest.mark.parametrize("again", [True, False])
def test_an_evaluation_says_what_the_model_owes_to_the_image(again: bool, seeing_run: dict[str, Any]) -> None:
    given = {"eval": {"problems": 3, "samples": 2, "pixelated": again}}
    setup = pipeline.prepared({**seeing_run, **given}, "opd")
    prompts = setup.source.prompts[:3]
    evaluator = Evaluator.from_config(setup.config, prompts, setup.source.grader, vocab=setup.learner.vocab)
    row = evaluator.evaluate(setup.student, models.engine(setup.config, setup.student, evaluator.vocab))
    assert ({ORIGINAL, PIXELATED, CHANGED} <= row.keys()) == again
    if again:
        assert row[ORIGINAL]["value"] == row["avg@2"]["value"]
        assert 0.0 < row[CHANGED]["value"] <= 1.0, "random weights read the image as they read anything"
