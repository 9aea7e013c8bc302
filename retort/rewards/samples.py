"""Rewards of samples: pictures and points, graded by what their prompts ask for.

A reward is a function of samples and their prompts that returns a number from 0 to 1 for each. The built-in ones need
no model. What is asked for stands in the prompt; where it does not, in the row's `answer`, in the same words:

| reward | what is asked for | a sample is right if |
|---|---|---|
| `glyph` | a single character in quotes, one of the task glyphs | template matching finds that character |
| `color` | a colour word, one of the task glyphs | the mean of the ink is nearest to it |
| `position` | `top left`, `top right`, `bottom left` or `bottom right` | the middle of the ink is in that quarter |
| `count` | a number from one to nine; else one, where a single character is asked for | it has so many marks |
| `on_shape` | the name of a shape of the task plane | the point is at most 0.3 from it |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from retort.core.rollouts import Prompt
from retort.errors import UserError, did_you_mean, quoted, shortened
from retort.rewards.base import Grade
from retort.rewards.user import imported, is_user_defined
from retort.tasks.glyphs import readers
from retort.tasks.glyphs.pictures import COLORS, FONT, POSITIONS
from retort.tasks.plane import shapes

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_QUOTED = re.compile(r"(?<!\w)(?:'(\S)'|\"(\S)\"|‘(\S)’|“(\S)”)(?!\w)")


class SampleReward(Protocol):
    """A reward of samples."""

    @property
    def name(self) -> str:
        """Its name, as in the setting `flow.rewards`."""
        ...

    def missing(self, prompt: Prompt) -> str | None:
        """What a prompt lacks to be graded, in words; None where nothing is missing."""
        ...

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Sequence[float]:
        """Grades samples.

        Args:
            samples: [N, 3, H, W] from 0 to 1, or points [N, 2].
            prompts: The prompt of each; nothing is missing in any.

        Returns:
            N numbers from 0 to 1.

        Raises:
            UserError: Samples of another kind, or a reward of the user's own that fails.
        """
        ...


@dataclass(frozen=True)
class BuiltinReward:
    """A reward that compares what a sample shows with what the prompt asks for.

    Attributes:
        name: Its name.
        wants: What a prompt must have, in words.
        find: Everything in a text that is asked for, in words of the reward's own.
        shows: Which samples show what is asked for, [N] bool, given the samples and what each is asked to show.
        axes: Shape of one sample, as messages have it.
        fits: Whether samples have that shape.
    """

    name: str
    wants: str
    find: Callable[[str], Sequence[str]]
    shows: Callable[[Tensor, Sequence[str]], Tensor]
    axes: str
    fits: Callable[[Tensor], bool]

    def asked(self, prompt: Prompt) -> str | None:
        """What is asked for: in the prompt, or else in its answer; None where that is nothing, or several things."""
        for text in (prompt.readable, prompt.answer or ""):
            found = dict.fromkeys(self.find(text))
            if found:
                return next(iter(found)) if len(found) == 1 else None
        return None

    def missing(self, prompt: Prompt) -> str | None:
        """See `SampleReward`."""
        return None if self.asked(prompt) is not None else self.wants

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Sequence[float]:
        """See `SampleReward`; a sample that is not finite is wrong."""
        if not self.fits(samples):
            raise UserError(f"reward '{self.name}' grades samples [N, {self.axes}], not {tuple(samples.shape)}")
        asked = [self.asked(prompt) or "" for prompt in prompts]
        samples = samples.detach().to("cpu", torch.float32)
        finite_N = samples.isfinite().flatten(1).all(1)
        right_N = self.shows(torch.nan_to_num(samples, 0.0, 0.0, 0.0), asked) & finite_N
        return [float(right) for right in right_N]


@dataclass(frozen=True)
class UserReward:
    """A function of the user's own as a reward.

    Attributes:
        name: `module:function`.
        function: Called with samples and prompts.
    """

    name: str
    function: Callable[[Tensor, Sequence[Prompt]], Any]

    def missing(self, prompt: Prompt) -> str | None:
        """Nothing: the function grades every prompt."""
        return None

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Sequence[float]:
        """See `SampleReward`. Whatever the function does to gradients ends with it."""
        try:
            returned = self.function(samples, prompts)
            numbers = [float(one) for one in returned]
        except (Exception, SystemExit) as error:  # sys.exit() must not end a run either
            words = " ".join(str(error).split())[:300]
            raise UserError(
                f"reward '{self.name}': it raised {type(error).__name__}: {words}, on {len(prompts)} samples of shape "
                f"{tuple(samples.shape[1:])}; return a number from 0 to 1 for each"
            ) from error
        if len(numbers) != len(prompts):
            raise UserError(f"reward '{self.name}': it gave {len(numbers)} numbers for {len(prompts)} samples")
        for number, prompt in zip(numbers, prompts, strict=True):
            if not (math.isfinite(number) and 0.0 <= number <= 1.0):
                raise UserError(
                    f"reward '{self.name}', row {quoted(prompt.id)}: it gave {number}; give a number from 0 to 1"
                )
        return numbers


def sample_reward(name: str) -> SampleReward:
    """A reward by its name.

    Args:
        name: A key of `SAMPLE_REWARDS`, or `module:function`, importable from the current folder.

    Raises:
        UserError: There is none of that name, or it cannot be imported.
    """
    if name in SAMPLE_REWARDS:
        return SAMPLE_REWARDS[name]
    if not is_user_defined(name):
        raise UserError(
            f"flow.rewards: no reward {quoted(name)}; {did_you_mean(name, SAMPLE_REWARDS)} (or module:function)"
        )
    wanted = "a function of samples and prompts"
    function: Any = imported(name, setting="flow.rewards", wanted=wanted)
    if not callable(function):
        raise UserError(f"flow.rewards = {name}: that cannot be called; name {wanted}")
    return UserReward(name, function)


class SampleGrader:
    """Grades samples by several rewards.

    The reward of a sample is the one that its prompt's domain names, if there is one of that name; else their mean.

    Attributes:
        rewards: The rewards by name.

    Example:
        >>> from retort.core.messages import Message
        >>> from retort.core.rollouts import Prompt
        >>> from retort.rewards.samples import SampleGrader
        >>> from retort.tasks.glyphs.pictures import picture
        >>> prompt = Prompt("1", (Message("user", "a blue 'T'"),), domain="color")
        >>> SampleGrader(["glyph", "color"]).grade(picture("T", "red", "top left")[None], [prompt])[0]
        Grade(reward=0.0, parts={'glyph': 1.0, 'color': 0.0}, feedback=None, measures={})
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Takes names of rewards.

        Args:
            names: As for `sample_reward`; one at least.

        Raises:
            UserError: None is named, one is named twice, or there is none of that name.
        """
        if not names or len(set(names)) < len(names):
            raise UserError(f"flow.rewards must name rewards, each once, not {list(names)}")
        self.rewards = {name: sample_reward(name) for name in names}

    @property
    def name(self) -> str:
        """The names of its rewards."""
        return ", ".join(self.rewards)

    def can_grade(self, prompt: Prompt) -> bool:
        """Whether the prompt has what its reward needs: that of its domain, or else all of them."""
        return self._missing(prompt) is None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts that cannot be graded.

        Raises:
            UserError: One cannot; the message names the first.
        """
        for prompt in prompts:
            missing = self._missing(prompt)
            if missing is not None:
                name, wants = missing
                raise UserError(
                    f"row {quoted(prompt.id)}, prompt {quoted(shortened(prompt.readable, 80))}: reward '{name}' finds "
                    f"nothing to grade by; it needs {wants} in the prompt, or in the column answer"
                )

    def grade(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[Grade]:
        """The grade of each sample; parts are all rewards by name that its prompt has what they need for.

        Args:
            samples: [N, ...], decoded: pictures from 0 to 1, or points.
            prompts: The prompt of each.

        Raises:
            UserError: A prompt cannot be graded, samples do not fit a reward, or one of the user's own fails.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"{len(samples)} samples for {len(prompts)} prompts")
        self.check(prompts)
        parts: list[dict[str, float]] = [{} for _ in prompts]
        for name, reward in self.rewards.items():
            rows = [row for row, prompt in enumerate(prompts) if reward.missing(prompt) is None]
            if rows:
                given = reward(samples[torch.tensor(rows)], [prompts[row] for row in rows])
                for row, number in zip(rows, given, strict=True):
                    parts[row][name] = number
        return [
            Grade(own[prompt.domain] if prompt.domain in own else sum(own.values()) / len(own), own)
            for own, prompt in zip(parts, prompts, strict=True)
        ]

    def _missing(self, prompt: Prompt) -> tuple[str, str] | None:
        """The reward that cannot grade a prompt, and what it needs."""
        needed = [prompt.domain] if prompt.domain in self.rewards else list(self.rewards)
        for name in needed:
            wants = self.rewards[name].missing(prompt)
            if wants is not None:
                return name, wants
        return None


def _find_glyph(text: str) -> list[str]:
    characters = ["".join(groups) for groups in _QUOTED.findall(text)]
    return characters if all(one in FONT for one in characters) else []


def _find_words(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Finds names in a text, whole words only; between the words of a name may stand spaces or a hyphen."""
    either = "|".join(re.escape(name).replace(r"\ ", r"[\s-]+") for name in names)
    pattern = re.compile(rf"(?<![\w'])(?:{either})(?![\w'])", re.IGNORECASE)

    def find(text: str) -> list[str]:
        return [" ".join(re.split(r"[\s-]+", one.lower())) for one in pattern.findall(text)]

    return find


def _find_count(text: str) -> list[str]:
    found = _find_words([*_NUMBERS, *map(str, range(1, 10))])(_QUOTED.sub(" ", text))
    numbers = [one if one in _NUMBERS else _NUMBERS[int(one) - 1] for one in found]
    return numbers or ["one"] * (len(set(_find_glyph(text))) == 1)


def _indices(names: Mapping[str, object] | Sequence[str], asked: Sequence[str]) -> Tensor:
    place = {name: index for index, name in enumerate(names)}
    return torch.tensor([place[one] for one in asked], dtype=torch.long)


def _in_quarter(images: Tensor, asked: Sequence[str]) -> Tensor:
    wanted_N2 = torch.tensor([POSITIONS[one] for one in asked])
    center_N2 = readers.center_N2(images)
    return ((center_N2 >= 0.5).long() == wanted_N2).all(1) & center_N2.isfinite().all(1)


def _on_shape(points: Tensor, asked: Sequence[str]) -> Tensor:
    found_N = torch.zeros(len(points), dtype=torch.bool)
    for name in set(asked):
        own = torch.tensor([one == name for one in asked])
        found_N[own] = shapes.on_shape(name, points[own])
    return found_N


def _of_images(
    name: str, wants: str, find: Callable[[str], Sequence[str]], shows: Callable[[Tensor, Sequence[str]], Tensor]
) -> BuiltinReward:
    return BuiltinReward(name, wants, find, shows, "3, height, width", lambda own: own.ndim == 4 and own.shape[1] == 3)


#: The built-in rewards by name.
SAMPLE_REWARDS: Mapping[str, SampleReward] = {
    reward.name: reward
    for reward in (
        _of_images(
            "glyph",
            f"one character in quotes, of {' '.join(FONT)}",
            _find_glyph,
            lambda images, asked: readers.glyph_N(images) == _indices(FONT, asked),
        ),
        _of_images(
            "color",
            f"one colour word, of {', '.join(COLORS)}",
            _find_words(list(COLORS)),
            lambda images, asked: readers.color_N(images) == _indices(COLORS, asked),
        ),
        _of_images("position", f"one of {', '.join(POSITIONS)}", _find_words(list(POSITIONS)), _in_quarter),
        _of_images(
            "count",
            "a number from one to nine",
            _find_count,
            lambda images, asked: readers.marks_N(images) == _indices(_NUMBERS, asked) + 1,
        ),
        BuiltinReward(
            "on_shape",
            f"the name of a shape: {', '.join(shapes.SHAPES)}",
            _find_words(list(shapes.SHAPES)),
            _on_shape,
            "2",
            lambda own: own.ndim == 2 and own.shape[1] == 2,
        ),
    )
}
