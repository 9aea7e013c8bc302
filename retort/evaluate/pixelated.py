"""What a model answers without the details of an image: the same prompts with their images pixelated.

Each completion is drawn again with the same random numbers. So what changes in it is owed to the image, and a model
that guesses answers as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from retort.align.text import after_thinking
from retort.core.rollouts import RIGHT_FROM, Prompt, Rollout
from retort.views import Changed, pixelate

__all__ = ["CHANGED", "ORIGINAL", "PIXELATED", "Pixelated", "final_answer"]

#: Measures of prompts with an image: completions that are right as it is and pixelated, and those whose
#: answer changes.
ORIGINAL, PIXELATED, CHANGED = "right_original", "right_pixelated", "changed_pixelated"
#: Characters at the end of a completion that are searched for its answer.
_TAIL = 1000
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARK = re.compile(r"\banswer\b(?:\s+is\b)?[\s:=*]*", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Pixelated:
    """Evaluates a second time, on pixelated images.

    Attributes:
        answers: Generates and grades the completions of some prompts, `samples` each, by random numbers that depend on
            the prompt's name and the member alone.
        samples: Completions per prompt.
    """

    answers: Callable[[Sequence[Prompt]], list[Rollout]]
    samples: int
    _changed: Changed = field(default_factory=lambda: Changed(pixelate), init=False, repr=False)

    def measures(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[dict[str, list[float]]]:
        """The measures by name, one number per completion, of each prompt that has an image.

        Args:
            prompts: Some prompts.
            rollouts: Their completions with the images as they are, `samples` each, graded where somebody grades.

        Raises:
            UserError: An image cannot be read.
        """
        chosen = [place for place, prompt in enumerate(prompts) if prompt.images]
        if not chosen:
            return []
        again = self.answers([self._changed(prompts[place]) for place in chosen])
        pairs = [(self._of(rollouts, place), self._of(again, number)) for number, place in enumerate(chosen)]
        return [self._compared(before, after) for before, after in pairs]

    def _of(self, rollouts: Sequence[Rollout], place: int) -> Sequence[Rollout]:
        return rollouts[place * self.samples : (place + 1) * self.samples]

    def _compared(self, before: Sequence[Rollout], after: Sequence[Rollout]) -> dict[str, list[float]]:
        pairs = ((final_answer(one.text), final_answer(other.text)) for one, other in zip(before, after, strict=True))
        changed = [float(one != other) for one, other in pairs]
        found = {CHANGED: changed}
        for name, own in ((ORIGINAL, before), (PIXELATED, after)):
            known = [float(rollout.reward >= RIGHT_FROM) for rollout in own if rollout.reward is not None]
            found |= {name: known} if known else {}
        return found


def final_answer(text: str) -> str:
    r"""The answer that a completion ends in, so far as it marks one; else all its text behind the thoughts.

    It is what stands in the last `\boxed{...}`, or behind the last word `answer`. White space, case and a full stop at
    the end make no difference.

    Example:
        >>> from retort.evaluate.pixelated import final_answer
        >>> final_answer("It is in row 2. The answer is: Blue."), final_answer("\\boxed{ 4 }"), final_answer("A cat ")
        ('blue', '4', 'a cat')
    """
    end = after_thinking(text).strip()[-_TAIL:]
    boxed = _BOXED.findall(end)
    found = boxed[-1] if boxed else _MARK.split(end)[-1]
    return " ".join((found or end).split()).rstrip(".").rstrip().casefold()
