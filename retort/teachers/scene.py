"""All that a view may look at when it makes a teacher's prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from retort.core.rollouts import Prompt, Rollout
from retort.core.streams import uniforms
from retort.teachers.templates import TEMPLATES, fill


@dataclass(frozen=True, eq=False)
class Stage:
    """What all scenes of a run have in common.

    Attributes:
        templates: By name, see `retort.teachers.templates`.
        seed: Of the run.
        pool: The training prompts, for views that show solved examples of others.
        longest: The longest prompt that a teacher is shown, tokens; None for what its context takes.
    """

    templates: Mapping[str, str] = field(default_factory=lambda: TEMPLATES)
    seed: int = 0
    pool: Sequence[Prompt] = ()
    longest: int | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """One rollout that is to be scored, with everything known about it.

    Attributes:
        rollout: It.
        group: All rollouts of this visit to its prompt, graded, in order of member; it is among them.
        stage: What does not depend on it.
        limit: Longest privileged text, characters; None for no limit. See `cut`.
        shown: Takes the names of the templates that a view filled in, where somebody counts them.
    """

    rollout: Rollout
    group: tuple[Rollout, ...]
    stage: Stage = field(default_factory=Stage)
    limit: int | None = None
    shown: set[str] | None = None

    @property
    def prompt(self) -> Prompt:
        """What the student was asked."""
        return self.rollout.prompt

    def chance(self, *key: str | int) -> float:
        """A number in [0, 1) that depends on the seed, the rollout and a key of the caller's, and on nothing else."""
        where = (self.rollout.visit, self.prompt.id, self.rollout.member)
        return float(uniforms(self.stage.seed, "views", *where, *key, count=1))

    def cut(self, text: str) -> str:
        """A privileged text, without its end where all would be too long for the teacher: put every text through it."""
        return text if self.limit is None else text.lstrip()[: self.limit]

    def section(self, template: str, text: str, prompt: str = "") -> str:
        """A text in the words of a template; an empty text is shown in no words, and gives an empty section."""
        kept = self.cut(text)
        if not kept.strip():
            return ""
        if self.shown is not None:
            self.shown.add(template)
        return fill(self.stage.templates[template], text=kept, prompt=self.cut(prompt))

    def framed(self, sections: Sequence[str]) -> Prompt | None:
        """The student's prompt with sections around its last turn; None if they are all empty. Earlier turns stay."""
        sections = [section for section in sections if section.strip()]
        if not sections:
            return None
        *before, last = self.prompt.messages
        words = self.stage.templates
        content = fill(words["frame"], prompt=last.content, sections="\n\n".join(sections), closing=words["closing"])
        return replace(self.prompt, messages=(*before, replace(last, content=content)))

    def shortened(self, render: Callable[[Scene], Prompt | None], fits: Callable[[Prompt], bool]) -> Prompt | None:
        """The prompt with each privileged text cut at its end to the longest length that fits; None if none does.

        At least one character of each stays: a text that is cut to nothing is no context.

        Args:
            render: Makes a prompt from a scene.
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
