"""What a teacher sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from retort.types import Prompt


@dataclass(frozen=True)
class View:
    """What a teacher sees of a rollout.

    Attributes:
        render: The prompt as the teacher sees it, made from the student's prompt; None for the same prompt. Whatever it
            returns, the teacher scores the very tokens that the student wrote after it.
    """

    render: Callable[[Prompt], Prompt] | None = None

    @staticmethod
    def same_prompt() -> View:
        """The teacher sees what the student saw."""
        return View()

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt that the teacher gets."""
        return prompt if self.render is None else self.render(prompt)
