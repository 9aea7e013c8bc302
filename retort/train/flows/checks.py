"""What is checked of models and prompts before a student decides its first denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from retort.core.rollouts import Prompt
from retort.errors import UserError, quoted
from retort.flows.base import ChecksTexts
from retort.flows.model import FlowModel
from retort.teachers.base import Teacher
from retort.teachers.routed import RoutedTeacher


def check_learns(student: FlowModel) -> None:
    """Refuses a student of which nothing can learn.

    Raises:
        UserError: It has no weights, none that learn, or some that learn in half precision.
    """
    learns = student.trainable()
    if not learns:
        raise UserError(
            f"student {student.name}: none of its weights learns; call module.requires_grad_(True), or train an "
            "adapter (lora.rank)"
        )
    for name, own in learns.items():
        if own.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"student {student.name}: its weight '{name}' is {own.dtype}, and what learns must be fp32; call "
                "module.float() (precision = bf16 makes products in bf16)"
            )


def check_prompts(models: Mapping[str, FlowModel], prompts: Sequence[Prompt], teacher: Teacher | None = None) -> None:
    """Refuses prompts that a model cannot read, before anything is generated.

    Args:
        models: Those that are asked, by name.
        prompts: The prompts.
        teacher: If it is routed, each of its teachers reads its own prompts alone.

    Raises:
        UserError: One has images, or a model does not read one and knows it at once.
    """
    for prompt in prompts:
        if prompt.images:
            raise UserError(
                f"row {quoted(prompt.id)}: its prompt has an image, and a flow model reads text alone; leave the "
                "column out"
            )
    experts = teacher.teachers if isinstance(teacher, RoutedTeacher) else {}
    for name, model in models.items():
        if isinstance(model.of, ChecksTexts):
            read = [own for own in prompts if name not in experts or teacher.route(own) == name]  # pyright: ignore
            try:
                model.of.check_texts(list(dict.fromkeys(own.text for own in read)))
            except UserError as error:
                raise UserError(f"{name} {model.name}: {error}") from None
