"""Puts the teachers of a run together as its settings say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from retort.config.teachers import TeachersSection
from retort.core.rollouts import Prompt
from retort.errors import UserError, did_you_mean, quoted
from retort.rewards.base import Grader
from retort.rewards.user import imported
from retort.teachers.base import Teacher
from retort.teachers.mixture import MixtureTeacher
from retort.teachers.routed import BestTeacher, Route, RoutedTeacher


def several(
    settings: TeachersSection, models: Mapping[str, Teacher], prompts: Sequence[Prompt], grader: Grader | None
) -> Teacher:
    """The teacher that several models are together.

    Args:
        settings: How they are put together.
        models: The teachers of the run by name.
        prompts: All prompts of the run, for each of which a route must lead to a teacher.
        grader: Grades every prompt; None where some cannot be graded.

    Raises:
        UserError: A prompt has no teacher among them, or there are no rewards to find the best by.
    """
    named = {name: models[name] for name in settings.models}
    if settings.combine == "route":
        return RoutedTeacher(named, route(settings, prompts))
    if settings.combine == "best":
        if grader is None:
            raise UserError(
                "teachers.combine = best takes the rewards of all completions, and not every row of the data can be "
                "graded; add the column `answer`, or use combine = route"
            )
        return BestTeacher(named)
    mean = "arithmetic" if settings.combine == "mixture" else "geometric"
    return MixtureTeacher(named, settings.weights, mean=mean)


def route(settings: TeachersSection, prompts: Sequence[Prompt]) -> Route:
    """The function that names a prompt's teacher, tried on every prompt.

    Raises:
        UserError: It names none of the teachers, or is the caller's own and fails.
    """
    by_domain = settings.by == "domain"
    chosen = (lambda prompt: prompt.domain) if by_domain else _own(settings.by)
    for prompt in prompts:
        name = chosen(prompt)
        if name in settings.models:
            continue
        if by_domain and not name:
            raise UserError(
                f"teachers.by = domain: row '{prompt.id}' has no `domain`, which names its teacher; add the column, "
                "or map it: columns.domain=NAME_IN_THE_FILE (those held out of eval.data need it, too)"
            )
        whose = "has the domain" if by_domain else f"is given to ({settings.by})"
        raise UserError(
            f"teachers.by: row '{prompt.id}' {whose} {quoted(name)}, which is none of teachers.models "
            f"({', '.join(settings.models)}); {did_you_mean(str(name), settings.models)}"
        )
    return chosen


def _own(by: str) -> Route:
    """A function of the caller's own, whose errors are said in a line."""
    try:
        function = cast("Callable[[Prompt], Any]", imported(by))
    except UserError as error:
        raise UserError(str(error).replace(f"task = {by}", f"teachers.by = {by}", 1)) from None

    def chosen(prompt: Prompt) -> str:
        try:
            return function(prompt)
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            raise UserError(
                f"teachers.by = {by}: it raised {type(error).__name__}: {words} on row '{prompt.id}'; it must name a "
                "teacher for every prompt"
            ) from error

    return chosen
