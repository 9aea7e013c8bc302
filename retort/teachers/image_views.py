"""Views of images: a teacher that sees other images than the student, or further ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Prompt
from retort.teachers.moving import Weights
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.views import Changed, check_ratio, pixelate

__all__ = ["changed_images", "pixelated", "privileged_images"]


def changed_images(
    change: Callable[[PromptImage], PromptImage], *, model: str = "teacher", weights: Weights | None = None
) -> View:
    """The student's prompt with every image changed; no context for a prompt without images.

    Args:
        change: Returns a changed image, such as `retort.views.pixelate` or one of your own. It must keep the size where
            the number of image tokens is to stay. It is called once for an image, as long as the result is kept
            (`retort.views.Changed`).
        model: The model that scores.
        weights: Weights of a student that teaches itself; frozen by default.

    Example:
        >>> from retort.teachers.image_views import changed_images
        >>> from retort.views import blank
        >>> changed_images(blank).model
        'teacher'
    """
    changed = Changed(change)

    def render(view_input: ViewInput) -> Prompt | None:
        return changed(view_input.prompt)

    return View(render, model, weights or Weights(), images="own")


def pixelated(ratio: float = 0.1, *, model: str = "teacher", weights: Weights | None = None) -> View:
    """The student's prompt with every image pixelated: the poorer view of VA-OPD (arXiv 2605.21924).

    Args:
        ratio: See `retort.views.pixelate`.
        model: As in `changed_images`.
        weights: As in `changed_images`.

    Raises:
        UserError: As `retort.views.pixelate` for the ratio.
    """
    check_ratio(ratio)
    return changed_images(partial(pixelate, ratio=ratio), model=model, weights=weights)


def privileged_images(model: str = "student", weights: Weights | None = None) -> View:
    """The prompt with the images that only a teacher may see (`Prompt.teacher_images`); no context without any.

    Where there are as many as the prompt has of its own, each takes the place of one, in order: the prompt's image with
    a box drawn in. Otherwise they are further ones, before the text of the last turn: a diagram.

    Args:
        model: The model that scores.
        weights: Weights of a student that teaches itself; frozen by default.
    """

    def render(view_input: ViewInput) -> Prompt | None:
        return _in_place(view_input.prompt) or _before(view_input.prompt)

    return View(render, model, weights or Weights(), images="teacher")


def _in_place(prompt: Prompt) -> Prompt | None:
    """The prompt with other images in place of its own; None if there are not as many."""
    if len(prompt.teacher_images) != len(prompt.images):
        return None
    left = iter(prompt.teacher_images)
    turns = (replace(turn, images=tuple(next(left) for _ in turn.images)) for turn in prompt.messages)
    return replace(prompt, messages=tuple(turns))


def _before(prompt: Prompt) -> Prompt:
    """The prompt with further images before the text of its last turn."""
    *earlier, last = prompt.messages
    more = prompt.teacher_images
    shown = replace(last, content=f"{PLACEHOLDER * len(more)}{last.content}", images=(*more, *last.images))
    return replace(prompt, messages=(*earlier, shown))
