"""Views: the prompt that a teacher reads, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from retort.core.rollouts import Prompt, Rollout
from retort.errors import UserError
from retort.teachers.drafts import Draft
from retort.teachers.moving import Weights, frozen
from retort.teachers.view_input import ViewInput

#: Renders the prompt of a teacher; None where there is nothing to show, so that the rollout is left out.
Render = Callable[[ViewInput], Prompt | None]


@dataclass(frozen=True)
class View:
    """A teacher's view of a rollout. `retort.teachers.views` makes the usual ones.

    Attributes:
        render: Renders the teacher's prompt; None for the student's own. The teacher scores the student's very tokens
            after the prompt that it returns. Where it returns None there is no context, and the steps of that rollout
            are left out of all terms that read this view.
        model: The name of the model that scores: `teacher`, `base` (by default the student before training), `student`
            (itself, with weights of its own), or another of the run's `[models]`.
        weights: Weights of a student that teaches itself, see `retort.teachers.moving`; other models never move.
        columns: Columns of the data that it shows; a row without one of them has no context.
        rewards: Whether it reads the grades of the rollouts.
        draft: Texts that it shows and that models write before.
        by_step: Whether each sequence of a rollout has a prompt of its own, rendered from the conversation before it;
            else the one prompt takes the place of the first one everywhere.
        images: The images of a row that it shows: the prompt's `own`, changed, or those for a `teacher` alone
            (`Prompt.teacher_images`); a row without any has no context. None: the prompt's own as they are, if any.
        leaves_out: Says of a rollout whether its teacher is not to be asked about it; None: it always is.
    """

    render: Render | None = None
    model: str = "teacher"
    weights: Weights = field(default_factory=frozen)
    columns: tuple[str, ...] = ()
    rewards: bool = False
    draft: Draft | None = None
    by_step: bool = False
    images: Literal["own", "teacher"] | None = None
    leaves_out: Callable[[Rollout], bool] | None = None

    def __post_init__(self) -> None:
        if self.model != "student" and self.weights != frozen():
            raise UserError(f"a view of the {self.model} cannot have moving weights ({self.weights.kind})")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models that it takes: the one that scores, and those that write."""
        writing = () if self.draft is None else tuple(author.model for author in self.draft.authors)
        return tuple(dict.fromkeys((self.model, *writing)))

    @staticmethod
    def same_prompt() -> View:
        """The view of the student's own prompt, scored by the teacher."""
        return View()

    @staticmethod
    def base() -> View:
        """The view of the student's own prompt, scored by the base model."""
        return View(model="base")

    def can_show(self, prompt: Prompt) -> bool:
        """Whether a row has all that the view shows of it: texts, and images."""
        if any(not prompt.shown(column) for column in self.columns):
            return False
        return bool({None: True, "own": prompt.images, "teacher": prompt.teacher_images}[self.images])

    def prompt(self, view_input: ViewInput) -> Prompt | None:
        """The prompt that the teacher reads; None where there is no context."""
        if not self.can_show(view_input.prompt):
            return None
        if self.leaves_out is not None and self.leaves_out(view_input.rollout):
            return None
        return view_input.prompt if self.render is None else self.render(view_input)
