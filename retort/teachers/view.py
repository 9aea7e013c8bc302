"""What a teacher sees, and whose weights it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.teachers.moving import Weights, frozen
from retort.teachers.scene import Scene

#: The prompt as a teacher sees it; None where there is nothing to show it, so that the rollout is left out.
Render = Callable[[Scene], Prompt | None]


@dataclass(frozen=True)
class View:
    """What a teacher sees of a rollout. `retort.teachers.views` makes the usual ones.

    Attributes:
        render: The prompt as the teacher sees it; None for the student's own. Whatever it returns, the teacher scores
            the very tokens that the student wrote after it. Where it returns None there is no context, and the steps of
            that rollout are left out of all terms that ask this view anything.
        model: The name of the model that answers: `teacher`, `base` (by default the student as it was before
            training), `student` (itself, with weights of its own), or another of the run's `[models]`.
        weights: Of a student that teaches itself, see `retort.teachers.moving`; other models never move.
        columns: What it shows of a row of the data; a row without is one without context.
        rewards: Whether it looks at how the rollouts were graded.
    """

    render: Render | None = None
    model: str = "teacher"
    weights: Weights = field(default_factory=frozen)
    columns: tuple[str, ...] = ()
    rewards: bool = False

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

    def prompt(self, scene: Scene) -> Prompt | None:
        """The prompt that the teacher gets."""
        if any(not scene.prompt.shown(column) for column in self.columns):
            return None
        return scene.prompt if self.render is None else self.render(scene)
