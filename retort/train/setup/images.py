"""Checks of images before anything is generated: every model reads them, and all as the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from retort.align.pair import SameIds
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.models.described import Described
from retort.models.images import same_image_tokens
from retort.models.lm import LanguageModel
from retort.teachers.reader import Reader


def refuse_text_alone(models: Mapping[str, Described], prompts: Iterable[Prompt]) -> None:
    """Refuses models of text alone where a prompt holds an image.

    Args:
        models: All models of the run, by role.
        prompts: All prompts of the run.

    Raises:
        UserError: There is such a model, and such a prompt.
    """
    shown = next((prompt for prompt in prompts if prompt.images), None)
    for role, own in models.items():
        if shown is not None and own.image_tokens is None:
            raise UserError(
                f"prompt '{shown.id}' holds an image, and the {role} {own.name} reads text alone; give a model that "
                "reads images, or leave that row out"
            )


def check_images(student: LanguageModel, readers: Mapping[str, Reader], prompts: Sequence[Prompt]) -> None:
    """Checks that student and teachers write as many tokens for each image, and that the student has its features.

    Models of text alone are refused before this, see `refuse_text_alone`.

    Args:
        student: The student.
        readers: The models beside it, by role.
        prompts: All prompts of the run.

    Raises:
        UserError: One of them does not, or has another tokenizer than the student.
    """
    images = [image for prompt in prompts for image in prompt.images]
    if not images or student.vision is None:
        return
    student.vision.check_counts(images)
    for role, reader in readers.items():
        if reader.lm is student:
            continue
        if not isinstance(reader.alignment, SameIds):
            raise UserError(
                f"the {role} {reader.name} has another tokenizer than the student, and images are read by models of "
                "one tokenizer only; give a teacher of the student's family"
            )
        same_image_tokens(student, reader.lm, images)
