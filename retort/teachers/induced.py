"""What a teacher makes of other problems, solved: an instruction that it writes first, and then has in sight."""

from __future__ import annotations

from collections.abc import Sequence

from retort.core.passages import Passage
from retort.core.rollouts import Prompt
from retort.teachers.drafts import Author, Draft, Turn
from retort.teachers.moving import Weights, frozen
from retort.teachers.others import Choose, at_random
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.teachers.views import solved, without_thoughts


def induced(
    views: int,
    count: int,
    *,
    choose: Choose = at_random,
    model: str = "student",
    weights: Weights | None = None,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> list[View]:
    """Views of the prompt with an instruction, written for each view from other problems of the training data.

    All are written once for a visit to a prompt, with that prompt in sight, and without any rollout or privileged text
    of its row. There is no context where nothing was written, or where the data have too few other problems.

    Args:
        views: Number of views, each with an instruction of its own.
        count: Number of problems that an instruction is written from.
        choose: Chooses them.
        model: The model that writes and scores.
        weights: Weights of a student that teaches itself; it writes with the same.
        temperature: Temperature at which it writes.
        max_new_tokens: Longest instruction, tokens; None: as long as the student's completions may be.

    Raises:
        UserError: There is no view, or the temperature is not positive.
    """

    def ask(view_input: ViewInput, passages: Sequence[Passage], turn: Turn) -> Prompt | None:
        sections = solved(view_input, choose(view_input, count, turn.author))
        return view_input.framed([*sections, view_input.plain("induce")], closing="") if sections else None

    author = Author(model, weights or frozen())
    draft = Draft("instruction", (author,) * views, ask, temperature=temperature, max_new_tokens=max_new_tokens)

    def view(place: int) -> View:
        def render(view_input: ViewInput) -> Prompt | None:
            own = [said for said in draft.of(view_input.rollout) if said.author == place]
            return view_input.framed([view_input.section("instruction", without_thoughts(said.text)) for said in own])

        return View(render, model, weights or frozen(), draft=draft)

    return [view(place) for place in range(views)]
