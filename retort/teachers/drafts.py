"""Texts that must be written before a view can be rendered: a debate, a rationale, a summary.

A `Draft` says who writes what, from which prompt; a run has the models write it, and hands the passages to the views
with the rollout (`Rollout.passages`), so that what renders a prompt stays a pure function. The passages depend only on
weights, the seed, the visit to a prompt and the place of the passage, so a run that goes on writes them again alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from retort.core.passages import Passage
from retort.core.rollouts import Prompt, Rollout
from retort.errors import UserError
from retort.teachers.moving import Weights, frozen
from retort.teachers.view_input import ViewInput


@dataclass(frozen=True)
class Author:
    """A model that writes.

    Attributes:
        model: Its name in a run: `teacher`, `student`, `base`, or another of `[models]`.
        weights: Weights of a student that writes for itself.
    """

    model: str
    weights: Weights = field(default_factory=frozen)

    def __post_init__(self) -> None:
        if self.model != "student" and self.weights != frozen():
            raise UserError(f"texts of the {self.model} cannot be written with moving weights ({self.weights.kind})")
        if self.weights.kind == "trust_region":
            raise UserError(
                "a trust region mixes the logits of two models, and writes nothing; name live or frozen weights"
            )


@dataclass(frozen=True)
class Turn:
    """Whose turn it is to write.

    Attributes:
        author: Place of the author, from 0.
        round: The round, from 0.
        last: Whether it is the last round.
    """

    author: int
    round: int
    last: bool


#: Renders the prompt of an author, from what is known of a rollout and the passages of earlier rounds; None: it is
#: not asked.
Ask = Callable[[ViewInput, Sequence[Passage], Turn], Prompt | None]


@dataclass(frozen=True)
class Draft:
    """Texts that models write before a teacher scores.

    Attributes:
        name: Name of this kind of text; random streams are keyed by it. Views that are to show the same texts hold one
            and the same `Draft`.
        authors: Who writes. In a round all of them write at once, and see earlier rounds only.
        ask: Renders an author's prompt.
        rounds: Number of rounds.
        temperature: Temperature of sampling.
        top_p: Probability mass of the nucleus.
        max_new_tokens: Longest text, tokens; None: as long as the student's completions may be.
        per: `visit`: once for all rollouts of a visit to a prompt; `step`: once for each sequence of a rollout, of the
            conversation before it. The authors of both never see what the student wrote last: the input of `ask` does
            not hold it. `rollout`: once for each rollout, which `ask` may show.
        confidence: Reads how sure an author says to be from what it wrote last, 0 to 100; None: nobody is asked.

    Raises:
        UserError: There is no author or round, or sampling is out of range.
    """

    name: str
    authors: tuple[Author, ...]
    ask: Ask
    rounds: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    per: Literal["visit", "step", "rollout"] = "visit"
    confidence: Callable[[str], float | None] | None = None

    def __post_init__(self) -> None:
        if not self.authors or self.rounds < 1:
            raise UserError(f"{self.name}: at least one model must write, in at least one round")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self.name}: temperature must be positive and top_p in (0, 1], not {self.temperature} and "
                f"{self.top_p}"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"{self.name}: a text has at least 1 token, not {self.max_new_tokens}")

    def turns(self, number: int) -> list[Turn]:
        """The turns of a round."""
        return [Turn(author, number, number == self.rounds - 1) for author in range(len(self.authors))]

    def of(self, rollout: Rollout) -> tuple[Passage, ...]:
        """What was written for a rollout, in order."""
        return tuple(own for own in rollout.passages if own.of == self.name)

    def passage(self, turn: Turn, text: str, *, completed: bool = True) -> Passage:
        """What an author wrote in its turn."""
        sure = self.confidence(text) if self.confidence is not None and turn.last else None
        model, count = self.authors[turn.author].model, len(self.authors)
        return Passage(self.name, turn.author, model, turn.round, text, completed, sure, authors=count)

    def example(self, text: str) -> tuple[Passage, ...]:
        """Passages that all say one thing, for checks before a run."""
        return tuple(self.passage(turn, text) for number in range(self.rounds) for turn in self.turns(number))


def blind(rollout: Rollout) -> Rollout:
    """A rollout of which nothing that was generated is known: the prompt, and who it is."""
    context = rollout.sequences[0].prefix
    return Rollout(rollout.prompt, (context,), member=rollout.member, visit=rollout.visit)
