"""A debate of several teachers, which is written before they score, and their views of it.

The debate is blind: no teacher is shown what the student wrote, nor the reference answer. MAD-OPD, arXiv 2605.01347.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from retort.core.passages import Passage
from retort.core.rollouts import Prompt, Rollout
from retort.errors import UserError
from retort.teachers.drafts import Author, Draft, Turn
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.teachers.views import without_thoughts

_CONFIDENCE = re.compile(r"<<\s*CONFIDENCE\s*=\s*(\d{1,3})\s*>>", re.IGNORECASE)


def teacher_names(count: int) -> tuple[str, ...]:
    """Names of the models and views of several teachers: `teacher`, `teacher_2`, and so on.

    Raises:
        UserError: There is none.
    """
    if count < 1:
        raise UserError(f"there must be at least 1 teacher, not {count}")
    return ("teacher", *(f"teacher_{number}" for number in range(2, count + 1)))


def read_confidence(text: str) -> float | None:
    """The number of the last tag `<<CONFIDENCE=N>>` in a text, 0 to 100; None without one. Prose does not count."""
    found = [int(own) for own in _CONFIDENCE.findall(text) if int(own) <= 100]
    return float(found[-1]) if found else None


def repetition(text: str, words: int = 3) -> float:
    """Share of a text's runs of so many words that were there before, 0 to 1; 0 where it has no such run."""
    own = text.split()
    runs = [tuple(own[start : start + words]) for start in range(len(own) - words + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def repeats(limit: float) -> Callable[[Rollout], bool] | None:
    """Says of a rollout whether it repeats itself more than that; None at a limit of 1, which nothing exceeds.

    Raises:
        UserError: The limit is not in (0, 1].
    """
    if not 0 < limit <= 1:
        raise UserError(f"repetition_limit must lie in (0, 1], not {limit}")
    return None if limit == 1 else lambda rollout: repetition(rollout.text) > limit


def transcript(view_input: ViewInput, passages: Sequence[Passage]) -> str:
    """What was said, round by round; without the thoughts of those who spoke, and without those who said nothing."""
    spoken = [(own, without_thoughts(own.text)) for own in passages]
    speeches = [
        view_input.plain("speech", text, f"Expert {own.author + 1}, round {own.round + 1}")
        for own, text in spoken
        if text
    ]
    return "\n\n".join(speeches)


def debate(
    models: Sequence[str],
    *,
    rounds: int = 2,
    temperature: float = 0.7,
    top_p: float = 0.8,
    max_new_tokens: int | None = None,
    confidence: bool = True,
    per: Literal["visit", "step"] = "visit",
) -> Draft:
    """A debate: all models answer the prompt at once, and then answer again, with all that was said before in sight.

    Args:
        models: Names of the models.
        rounds: Number of rounds.
        temperature: Temperature of sampling.
        top_p: Top-p of sampling.
        max_new_tokens: Longest answer, tokens; None: as long as the student's.
        confidence: Whether they are asked how sure they are.
        per: Once for a visit to a prompt, or once for each step of an episode, about the conversation before it.
    """

    def ask(view_input: ViewInput, passages: Sequence[Passage], turn: Turn) -> Prompt | None:
        before = view_input.section("discussion", transcript(view_input, passages))
        request = view_input.plain("debate_again" if before else "debate_first")
        asked = [before, view_input.plain("expert", str(turn.author + 1)), request]
        framed = view_input.framed([*asked, view_input.plain("confidence") if confidence else ""], closing="")
        return framed or view_input.prompt  # of templates without words nothing is left but the question

    return Draft(
        "debate",
        tuple(Author(name) for name in models),
        ask,
        rounds,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        per=per,
        confidence=read_confidence if confidence else None,
    )


def debated(model: str, index: int, draft: Draft, *, shown: bool, leaves_out: Callable[[Rollout], bool] | None) -> View:
    """The view of one teacher who took part in a debate; no context where nobody said anything.

    Args:
        model: Name of the model.
        index: Its place among the experts, from 0.
        draft: The debate.
        shown: Whether the transcript is shown; else the student's own prompt is read, and only the weights are of the
            debate.
        leaves_out: See `View`.
    """

    def render(view_input: ViewInput) -> Prompt | None:
        said = view_input.section("discussion", transcript(view_input, draft.of(view_input.rollout)))
        return view_input.framed([view_input.plain("expert", str(index + 1)), said]) if said else None

    by_step = draft.per == "step"
    return View(render if shown else None, model, draft=draft, by_step=shown and by_step, leaves_out=leaves_out)
