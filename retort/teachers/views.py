"""The usual views: privileged texts of a row, siblings and feedback, other problems solved, the clean prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from retort.core.rollouts import Prompt, Rollout
from retort.errors import UserError
from retort.teachers.moving import Weights
from retort.teachers.scene import Scene
from retort.teachers.view import Render, View

_THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


def _view(
    render: Render, model: str, weights: Weights | None, columns: tuple[str, ...] = (), *, rewards: bool = False
) -> View:
    return View(render, model, weights or Weights(), columns, rewards)


def privileged(*columns: str, model: str = "student", weights: Weights | None = None) -> View:
    """The prompt with privileged texts of its row; no context where the row lacks one of them.

    Args:
        columns: Of the data: `solution`, `answer`, `hint`, `outcome`, `demonstration` (or the row's `response`) or
            `wrong`; each is shown in the words of the template of its name.
        model: Who answers.
        weights: Of a student that teaches itself; frozen by default.
    """

    def render(scene: Scene) -> Prompt | None:
        sections = [scene.section(column, scene.prompt.shown(column) or "") for column in columns]
        return scene.framed(sections) if all(sections) else None

    return _view(render, model, weights, columns)


def clean(model: str = "student", weights: Weights | None = None) -> View:
    """The prompt without what is not to change the answer (`clean`): the other half of a pair of prompts."""

    def render(scene: Scene) -> Prompt | None:
        found = scene.prompt.clean
        return None if found is None else replace(scene.prompt, messages=found)

    return _view(render, model, weights, ("clean",))


def examples(count: int, place: int = 0, *, model: str = "student", weights: Weights | None = None) -> View:
    """The prompt with other problems of the training data, solved; which ones is drawn anew for every visit.

    Args:
        count: How many. No context where the data has fewer others with a `demonstration` or a `response`.
        place: Number of this view, where a method has several of them: each draws its own.
        model: Who answers.
        weights: Of a student that teaches itself.

    Raises:
        UserError: No example.
    """
    if count < 1:
        raise UserError(f"a view of examples needs at least 1, not {count}")

    def render(scene: Scene) -> Prompt | None:
        pool = scene.stage.pool
        chosen: dict[str, Prompt] = {}
        for attempt in range(20 * count):  # a few rows may have nothing to show
            if not pool or len(chosen) == count:
                break
            # By visit, not by rollout: siblings are told the same, and their prompt is computed once.
            other = pool[int(_first_of(scene).chance("example", place, attempt) * len(pool))]
            if other.id != scene.prompt.id and other.shown("demonstration"):
                chosen[other.id] = other
        if len(chosen) < count:
            return None
        return scene.framed(
            [scene.section("example", other.shown("demonstration") or "", other.text) for other in chosen.values()]
        )

    return _view(render, model, weights)


def _first_of(scene: Scene) -> Scene:
    """The scene as that of the first of its siblings: what is drawn in it is the same for all of them."""
    return replace(scene, rollout=scene.group[0]) if scene.group else scene


def peers(
    *,
    successes: int = 1,
    failures: int = 0,
    threshold: float = 0.5,
    feedback: Literal["never", "without_success", "always"] = "without_success",
    failure_when: Literal["always", "without_success"] = "always",
    thoughts: bool = True,
    choice: Literal["graded", "random"] = "graded",
    model: str = "student",
    weights: Weights | None = None,
) -> View:
    """The prompt with what the rollout's siblings wrote, never with the rollout itself; no context where none is fit.

    SDPO (arXiv 2601.20802) shows the first success of the group, or else the feedback; multi-rollout OPD (arXiv
    2605.12652) up to two successes and a failure. A sibling that wrote the very same text as the rollout is a sibling
    like any other.

    Args:
        successes: How many siblings with a reward of at least `threshold`, the first ones in order.
        failures: How many of the others, drawn at random.
        threshold: Reward.
        feedback: When to show what the verifier says of the rollout itself.
        failure_when: When to show failures.
        thoughts: Whether a sibling's `<think>` block is shown, too.
        choice: `random` is a control: as many siblings in the same words, but drawn from all of them.
        model: Who answers.
        weights: Of a student that teaches itself.
    """

    def render(scene: Scene) -> Prompt | None:
        others = [other for other in scene.group if other.member != scene.rollout.member]
        right = [other for other in others if (other.reward or 0.0) >= threshold][:successes]
        wrong = [other for other in others if (other.reward or 0.0) < threshold]
        if failure_when == "always" or not right:
            wrong = sorted(wrong, key=lambda other: scene.chance("failure", other.member))[:failures]
        else:
            wrong = []
        if choice == "random":
            drawn = sorted(others, key=lambda other: scene.chance("peer", other.member))
            right, wrong = drawn[: len(right)], drawn[len(right) : len(right) + len(wrong)]
        sections = [scene.section("success", _shown(other, thoughts)) for other in right]
        sections += [scene.section("failure", _shown(other, thoughts)) for other in wrong]
        if scene.rollout.feedback and (feedback == "always" or (feedback == "without_success" and not right)):
            sections.append(scene.section("feedback", scene.rollout.feedback))
        return scene.framed(sections) if sections else None

    return _view(render, model, weights, rewards=True)


def _shown(rollout: Rollout, thoughts: bool) -> str:
    return rollout.text if thoughts else _THOUGHTS.sub("", rollout.text).strip()
