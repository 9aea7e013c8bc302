"""Which other problems of the training data a view shows: drawn at random, or those whose texts are most like it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from retort.core.rollouts import Prompt
from retort.teachers.view_input import ViewInput

#: Chooses so many other problems for the view of a number; fewer where the data have no more to show. Views of other
#: numbers get other ones.
Choose = Callable[[ViewInput, int, int], list[Prompt]]

#: Words, symbols, and single characters of scripts without spaces.
_WORDS = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+|[^\w\s]")
_ATTEMPTS = 20


def at_random(view_input: ViewInput, count: int, index: int) -> list[Prompt]:
    """Problems drawn anew for every visit, the same for all siblings; no two views of a method get the same one.

    Args:
        view_input: The rollout, and the training prompts.
        count: Number of problems.
        index: Number of the view, from 0.
    """
    pool, first = view_input.stage.pool, _first_of(view_input)
    taken: dict[tuple[tuple[str, ...], str | None], Prompt] = {}
    for view in range(index + 1):
        before = len(taken)
        for attempt in range(_ATTEMPTS * count):  # a few rows may have nothing to show
            if not pool or len(taken) == before + count:
                break
            # Drawn by visit, not by rollout: siblings get the same prompt, which is computed once.
            other = pool[int(first.uniform("example", view, attempt) * len(pool))]
            if _is_other(other, view_input.prompt):
                taken.setdefault(_texts(other), other)
        if len(taken) < before + count:
            return []
    return list(taken.values())[-count:]


@dataclass(eq=False)
class MostAlike:
    """Problems whose words are most like those of the prompt, the first ones for the first view and so on.

    Likeness is the cosine of counts of words, each times ln((1 + N) / (1 + n)) + 1, where n of the N training prompts
    have the word. Case does not count; in scripts without spaces each character is a word. Ties keep the order of the
    rows.

    Attributes:
        most: Problems that all views together may ask for.
    """

    most: int
    _index: _Index | None = field(default=None, init=False, repr=False)

    def __call__(self, view_input: ViewInput, count: int, index: int) -> list[Prompt]:
        """The problems of a view; see `Choose`."""
        pool = view_input.stage.pool
        if self._index is None or self._index.pool is not pool:
            self._index = _Index(pool, self.most)
        found = self._index.others(view_input.prompt)[index * count : (index + 1) * count]
        return found if len(found) == count else []


class _Index:
    """The words of the training prompts, as vectors of length 1 without their zeros."""

    def __init__(self, pool: Sequence[Prompt], most: int) -> None:
        self.pool, self.most = pool, most
        self._found: dict[tuple[str, tuple[str, ...]], list[Prompt]] = {}
        counts = [_counted(prompt) for prompt in pool]
        self.places = {word: place for place, word in enumerate(dict.fromkeys(w for own in counts for w in own))}
        sizes = torch.tensor([len(own) for own in counts], dtype=torch.long)
        self.row_E = torch.arange(len(pool)).repeat_interleave(sizes)
        self.word_E = torch.tensor([self.places[word] for own in counts for word in own], dtype=torch.long)
        rows_W = torch.bincount(self.word_E, minlength=len(self.places))
        self.rarity_W = torch.log((1 + len(pool)) / (1 + rows_W.double())) + 1
        value_E = (
            torch.tensor([number for own in counts for number in own.values()]).double() * self.rarity_W[self.word_E]
        )
        self.value_E = value_E / self._sums(value_E.square()).sqrt()[self.row_E]

    def others(self, prompt: Prompt) -> list[Prompt]:
        """The problems most like a prompt, without itself and without copies."""
        key = (prompt.id, _asked(prompt))
        if key not in self._found:
            self._found[key] = self._nearest(prompt)
        return self._found[key]

    def likeness(self, prompt: Prompt) -> Tensor:
        """The cosine of a prompt with each training prompt, [pool]; words that none of them has do not count."""
        known = {word: number for word, number in _counted(prompt).items() if word in self.places}
        own_W = torch.zeros_like(self.rarity_W)
        for word, number in known.items():
            own_W[self.places[word]] = number
        own_W *= self.rarity_W
        found = self._sums(self.value_E * own_W[self.word_E])
        return found / own_W.norm().clamp_min(torch.finfo(own_W.dtype).tiny)

    def _nearest(self, prompt: Prompt) -> list[Prompt]:
        # Rounded, so that sums in another order are ties still.
        order = self.likeness(prompt).round(decimals=9).sort(descending=True, stable=True).indices
        found: dict[tuple[tuple[str, ...], str | None], Prompt] = {}
        for place in order.tolist():
            if len(found) == self.most:
                break
            other = self.pool[place]
            if _is_other(other, prompt):
                found.setdefault(_texts(other), other)
        return list(found.values())

    def _sums(self, value_E: Tensor) -> Tensor:
        return torch.zeros(len(self.pool), dtype=value_E.dtype).index_add_(0, self.row_E, value_E)


def _counted(prompt: Prompt) -> Counter[str]:
    return Counter(_WORDS.findall(prompt.readable.lower()))


def _is_other(other: Prompt, prompt: Prompt) -> bool:
    """Whether it is another problem, and one with something to show; a copy would give the prompt's own solution."""
    return other.id != prompt.id and _asked(other) != _asked(prompt) and bool(other.shown("demonstration"))


def _texts(other: Prompt) -> tuple[tuple[str, ...], str | None]:
    return _asked(other), other.shown("demonstration")


def _asked(prompt: Prompt) -> tuple[str, ...]:
    """What tells problems apart: the text, and the images."""
    return (prompt.text, *(image.digest for image in prompt.images))


def _first_of(view_input: ViewInput) -> ViewInput:
    """The input of the first of its siblings, so that random draws are the same for all of them."""
    return replace(view_input, rollout=view_input.group[0]) if view_input.group else view_input
