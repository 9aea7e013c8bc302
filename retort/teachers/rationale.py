"""Privileged texts about which the teacher writes a rationale first, which it then has in sight, too (OPSD)."""

from __future__ import annotations

from collections.abc import Sequence

from retort.core.passages import Passage
from retort.core.rollouts import Prompt
from retort.teachers.drafts import Author, Draft, Turn
from retort.teachers.moving import Weights, frozen
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.teachers.views import without_thoughts


def reasoned(
    *columns: str,
    model: str = "student",
    weights: Weights | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
) -> View:
    """The prompt with privileged texts of its row, and with what the teacher wrote about them before.

    It writes once for a visit to a prompt, and does not see any rollout. Where it writes nothing, it is shown the
    privileged texts alone; there is no context where the row lacks one of them.

    Args:
        columns: Columns of the data, see `retort.teachers.views.privileged`.
        model: The model that writes and scores.
        weights: Weights of a student that teaches itself; it writes with the same.
        temperature: Temperature at which it writes.
        top_p: Top-p at which it writes.
        max_new_tokens: Longest rationale, tokens; None: as long as the student's completions may be.
    """

    def sections(view_input: ViewInput) -> list[str] | None:
        found = [view_input.section(column, view_input.prompt.shown(column) or "") for column in columns]
        return found if all(found) else None

    def ask(view_input: ViewInput, passages: Sequence[Passage], turn: Turn) -> Prompt | None:
        shown = sections(view_input)
        return None if shown is None else view_input.framed([*shown, view_input.plain("reason")], closing="")

    author = Author(model, weights or frozen())
    draft = Draft("rationale", (author,), ask, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)

    def render(view_input: ViewInput) -> Prompt | None:
        shown = sections(view_input)
        if shown is None:
            return None
        notes = [without_thoughts(own.text) for own in draft.of(view_input.rollout)]
        return view_input.framed([*shown, *(view_input.section("rationale", text) for text in notes)])

    return View(render, model, weights or frozen(), columns, draft=draft)
