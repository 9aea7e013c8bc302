"""What a sentence says of a rollout, for views that show more siblings than there is room for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from retort.core.passages import Passage
from retort.core.rollouts import Prompt, Rollout
from retort.teachers.drafts import Author, Draft, Turn
from retort.teachers.moving import Weights, frozen
from retort.teachers.view_input import ViewInput
from retort.teachers.views import without_thoughts

_SUMMARY = re.compile(r"<summary>(.*?)</summary>", re.DOTALL | re.IGNORECASE)
#: Characters of a text that stand for it where it has no summary.
_BEGINNING = 300


def excerpt(text: str) -> str:
    """What a text itself marks as its summary, else its first 300 characters; thoughts do not count."""
    own = without_thoughts(text)
    found = _SUMMARY.findall(own)
    return (found[-1] if found else own[:_BEGINNING]).strip()


def summaries(
    model: str,
    weights: Weights | None = None,
    *,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> Draft:
    """A sentence about each rollout, written by a teacher that is shown it.

    Args:
        model: The model that writes.
        weights: Weights of a student that writes for itself.
        temperature: Temperature at which it writes.
        max_new_tokens: Longest summary, tokens; None: as long as the student's completions may be.
    """

    def ask(view_input: ViewInput, passages: Sequence[Passage], turn: Turn) -> Prompt | None:
        attempt = view_input.section("attempt", without_thoughts(view_input.rollout.text))
        return view_input.framed([attempt, view_input.plain("summarise")], closing="") if attempt else None

    return Draft(
        "summary",
        (Author(model, weights or frozen()),),
        ask,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        per="rollout",
    )


def summary_of(rollout: Rollout, draft: Draft | None) -> str:
    """The sentence about a rollout: what was written about it, or without that its own `excerpt`."""
    texts = [] if draft is None else [excerpt(own.text) for own in draft.of(rollout)]
    return next((text for text in texts if text), "") or excerpt(rollout.text)
