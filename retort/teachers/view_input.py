"""All inputs of a view when it renders a teacher's prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from retort.core.images import in_words
from retort.core.random_streams import uniforms
from retort.core.rollouts import Prompt, Rollout
from retort.teachers.templates import TEMPLATES, fill


@dataclass(frozen=True, eq=False)
class Stage:
    """The inputs that all rollouts of a run have in common.

    Attributes:
        templates: Templates by name, see `retort.teachers.templates`.
        seed: The run's seed.
        pool: The training prompts, for views that show solved examples of others.
        longest: The longest prompt of a teacher, tokens; None for the limit of its context.
    """

    templates: Mapping[str, str] = field(default_factory=lambda: TEMPLATES)
    seed: int = 0
    pool: Sequence[Prompt] = ()
    longest: int | None = None


@dataclass(frozen=True, eq=False)
class ViewInput:
    """One rollout to score, and the data that a view may show of it.

    Attributes:
        rollout: The rollout.
        group: All rollouts of this visit to its prompt, graded, in order of member; the rollout is among them.
        stage: Inputs that do not depend on the rollout.
        limit: Longest privileged text, characters; None for no limit. See `cut`.
        shown: A set that receives the names of the templates that a view filled in; None if they are not counted.
    """

    rollout: Rollout
    group: tuple[Rollout, ...]
    stage: Stage = field(default_factory=Stage)
    limit: int | None = None
    shown: set[str] | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt of the rollout."""
        return self.rollout.prompt

    def uniform(self, *key: str | int) -> float:
        """A uniform random number in [0, 1) that depends only on the seed, the rollout and a key of the caller's."""
        where = (self.rollout.visit, self.prompt.id, self.rollout.member)
        return float(uniforms(self.stage.seed, "views", *where, *key, count=1))

    def cut(self, text: str) -> str:
        """A privileged text, without its end where it is too long for the teacher; every text must pass through it."""
        return text if self.limit is None else text.lstrip()[: self.limit]

    def section(self, template: str, text: str, prompt: str = "") -> str:
        """A text in a template; an empty text gives an empty section."""
        kept = self.cut(text)
        if not kept.strip():
            return ""
        if self.shown is not None:
            self.shown.add(template)
        return fill(self.stage.templates[template], text=kept, prompt=self.cut(prompt))

    def plain(self, template: str, text: str = "", prompt: str = "") -> str:
        """A template filled in, whose texts are not cut."""
        return fill(self.stage.templates[template], text=text, prompt=prompt)

    def framed(self, sections: Sequence[str], closing: str = "closing") -> Prompt | None:
        """The student's prompt with sections around its last turn; None if they are all empty. Earlier turns stay.

        Args:
            sections: Texts in their templates.
            closing: Name of the template that comes last; empty for none.
        """
        sections = [section for section in sections if section.strip()]
        if not sections:
            return None
        *before, last = self.prompt.messages
        words = self.stage.templates
        frame, around, end = words["frame"], "\n\n".join(sections), words.get(closing, "")
        if last.images:  # Only the turn's own text says where they stand: what models wrote may spell that character.
            frame, around, end = map(in_words, (frame, around, end))
        content = fill(frame, prompt=last.content, sections=around, closing=end)
        return replace(self.prompt, messages=(*before, replace(last, content=content)))

    def shortened(self, render: Callable[[ViewInput], Prompt | None], fits: Callable[[Prompt], bool]) -> Prompt | None:
        """The prompt with each privileged text cut at its end to the longest length that fits; None if none does.

        At least one character of each stays: a text that is cut to nothing is no context.

        Args:
            render: Renders a prompt.
            fits: Whether a prompt is short enough; a shorter one fits, too.
        """

        def made(limit: int) -> Prompt | None:
            prompt = render(replace(self, limit=limit))
            return prompt if prompt is not None and fits(prompt) else None

        low, high, best = 1, 2**20, made(1)
        if best is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            found = made(middle)
            low, high, best = (middle, high, found) if found is not None else (low, middle, best)
        return best
