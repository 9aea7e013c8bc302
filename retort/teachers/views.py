"""The usual views: privileged texts of a row, siblings and feedback, other problems solved, the clean prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from retort.core.rollouts import Prompt, Rollout
from retort.errors import UserError
from retort.teachers.drafts import Draft
from retort.teachers.moving import Weights
from retort.teachers.others import Choose, at_random
from retort.teachers.view import Render, View
from retort.teachers.view_input import ViewInput

_THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


def _view(
    render: Render, model: str, weights: Weights | None, columns: tuple[str, ...] = (), *, rewards: bool = False
) -> View:
    return View(render, model, weights or Weights(), columns, rewards)


def privileged(*columns: str, model: str = "student", weights: Weights | None = None) -> View:
    """The prompt with privileged texts of its row; no context where the row lacks one of them.

    Args:
        columns: Columns of the data: `solution`, `answer`, `hint`, `outcome`, `demonstration` (or the row's `response`)
            or `wrong`; each is shown in the template of its name.
        model: The model that scores.
        weights: Weights of a student that teaches itself; frozen by default.
    """

    def render(view_input: ViewInput) -> Prompt | None:
        sections = [view_input.section(column, view_input.prompt.shown(column) or "") for column in columns]
        return view_input.framed(sections) if all(sections) else None

    return _view(render, model, weights, columns)


def clean(model: str = "student", weights: Weights | None = None) -> View:
    """The prompt without the text that must not change the answer (`clean`): the other half of a pair of prompts."""

    def render(view_input: ViewInput) -> Prompt | None:
        found = view_input.prompt.clean
        return None if found is None else replace(view_input.prompt, messages=found)

    return _view(render, model, weights, ("clean",))


def examples(
    count: int,
    index: int = 0,
    *,
    choose: Choose = at_random,
    model: str = "student",
    weights: Weights | None = None,
) -> View:
    """The prompt with other problems of the training data, solved.

    Args:
        count: Number of problems. No context where the data have fewer others with a `demonstration` or a `response`.
        index: Number of this view, where a method has several of them: each shows its own problems.
        choose: Chooses them: `retort.teachers.others.at_random`, anew for every visit, or its `MostAlike`.
        model: The model that scores.
        weights: Weights of a student that teaches itself.

    Raises:
        UserError: `count` is less than 1.
    """
    if count < 1:
        raise UserError(f"a view of examples needs at least 1, not {count}")

    def render(view_input: ViewInput) -> Prompt | None:
        return view_input.framed(solved(view_input, choose(view_input, count, index)))

    return _view(render, model, weights)


def solved(view_input: ViewInput, others: Sequence[Prompt]) -> list[str]:
    """Other problems with their solutions, each in its template."""
    return [view_input.section("example", other.shown("demonstration") or "", other.readable) for other in others]


def peers(
    *,
    successes: int = 1,
    failures: int = 0,
    threshold: float = 0.5,
    feedback: Literal["never", "without_success", "always"] = "without_success",
    failure_when: Literal["always", "without_success"] = "always",
    thoughts: bool = True,
    choice: Literal["graded", "random"] = "graded",
    summaries: int = 0,
    summary: Callable[[Rollout], str] | None = None,
    draft: Draft | None = None,
    model: str = "student",
    weights: Weights | None = None,
) -> View:
    """The prompt with the completions of the rollout's siblings, never its own; no context where none is suitable.

    SDPO (arXiv 2601.20802) shows the first success of the group, or else the feedback; multi-rollout OPD (arXiv
    2605.12652) up to two successes and a failure. A sibling with the very same text as the rollout is a sibling like
    any other.

    Args:
        successes: Number of siblings with a reward of at least `threshold` to show, the first ones in order.
        failures: Number of the others to show, drawn at random.
        threshold: Least reward of a success.
        feedback: When to show the verifier's feedback on the rollout itself.
        failure_when: When to show failures.
        thoughts: Whether a sibling's `<think>` block is shown, too.
        choice: `random` is a control: as many siblings in the same templates, but drawn from all of them.
        summaries: Number of further siblings, the first ones in order, of which a sentence is shown, behind the first
            success.
        summary: Gives that sentence; needed where there are any.
        draft: Texts that `summary` reads and that models write before.
        model: The model that scores.
        weights: Weights of a student that teaches itself.
    """

    def render(view_input: ViewInput) -> Prompt | None:
        others = [other for other in view_input.group if other.member != view_input.rollout.member]
        right = [other for other in others if (other.reward or 0.0) >= threshold][:successes]
        wrong = [other for other in others if (other.reward or 0.0) < threshold]
        if failure_when == "always" or not right:
            wrong = sorted(wrong, key=lambda other: view_input.uniform("failure", other.member))[:failures]
        else:
            wrong = []
        if choice == "random":
            drawn = sorted(others, key=lambda other: view_input.uniform("peer", other.member))
            right, wrong = drawn[: len(right)], drawn[len(right) : len(right) + len(wrong)]
        sections = [view_input.section("success", _shown(other, thoughts)) for other in right]
        if summary is not None and summaries:
            whole = {other.member for other in (*right, *wrong)}
            rest = [other for other in others if other.member not in whole][:summaries]
            sections[1:1] = [view_input.section("summary", summary(other)) for other in rest]
        sections += [view_input.section("failure", _shown(other, thoughts)) for other in wrong]
        if view_input.rollout.feedback and (feedback == "always" or (feedback == "without_success" and not right)):
            sections.append(view_input.section("feedback", view_input.rollout.feedback))
        return view_input.framed(sections) if sections else None

    return replace(_view(render, model, weights, rewards=True), draft=draft)


def without_thoughts(text: str) -> str:
    """A text without its `<think>` blocks; one that is still open ends it."""
    return _THOUGHTS.sub("", text).strip()


def _shown(rollout: Rollout, thoughts: bool) -> str:
    return rollout.text if thoughts else without_thoughts(rollout.text)
