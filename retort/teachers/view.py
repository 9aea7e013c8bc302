"""What a teacher sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from retort.errors import UserError
from retort.teachers.moving import Weights, frozen
from retort.types import Prompt


@dataclass(frozen=True)
class View:
    """What a teacher sees of a rollout.

    Attributes:
        render: The prompt as the teacher sees it, made from the student's prompt; None for the same prompt. Whatever it
            returns, the teacher scores the very tokens that the student wrote after it.
        model: Which model answers: the teacher, the base (a run's `base`; by default the student as it was before
            training), or the student itself, with weights of its own.
        weights: Of a student that teaches itself, see `retort.teachers.moving`; other models never move.
    """

    render: Callable[[Prompt], Prompt] | None = None
    model: Literal["teacher", "base", "student"] = "teacher"
    weights: Weights = field(default_factory=frozen)

    def __post_init__(self) -> None:
        if self.model != "student" and self.weights != frozen():
            raise UserError(f"a view of the {self.model} cannot have moving weights ({self.weights.kind})")

    @staticmethod
    def same_prompt() -> View:
        """The teacher sees what the student saw."""
        return View()

    @staticmethod
    def base() -> View:
        """The base model sees what the student saw."""
        return View(model="base")

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt that the teacher gets."""
        return prompt if self.render is None else self.render(prompt)
