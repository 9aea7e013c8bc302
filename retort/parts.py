"""The small pure functions that a method is composed of, each with what it asks of a teacher.

A part is evaluated on one chunk of steps at a time: `part.value(context, view)` returns one number per step, [N].
The subclasses are slots, not behaviour: they keep a weight from being passed where a divergence belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from retort.context import Context
from retort.types import Need


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the steps of a whole batch stand.

    Attributes:
        rollout_N: Index of the rollout of each step; a rollout's steps come in order.
        sentence_N: Index of the sentence within its rollout; None where no text is known.
        found: What was stored by the statistics before, [N] each, by name.
    """

    rollout_N: Tensor
    sentence_N: Tensor | None = None
    found: Mapping[str, Tensor] = field(default_factory=lambda: {})


@dataclass(frozen=True)
class Stat:
    """A number per step that depends on more than the step: taken over the whole batch before the first update on it.

    Whoever uses it reads `context.stored[name]`, and names it in its `stats`.

    Attributes:
        name: Under which it is stored; two of one name must be the same.
        part: What is evaluated at each step first.
        finish: (its values at all steps, where they stand) -> [N].
        sentences: Whether it wants to know the sentences.
    """

    name: str
    part: Part
    finish: Callable[[Tensor, Layout], Tensor]
    sentences: bool = False


@dataclass(frozen=True)
class Part:
    """A function of the context that gives one number per step.

    Attributes:
        name: Readable name, with its settings.
        value: (context, view) -> [N].
        needs: What it asks of the view's teacher.
        also: What it asks of other views, by name.
        stats: What it reads of the whole batch.
    """

    name: str
    value: Callable[[Context, str], Tensor]
    needs: frozenset[Need] = frozenset()
    also: Mapping[str, frozenset[Need]] = field(default_factory=lambda: {})
    stats: tuple[Stat, ...] = ()

    def asks(self, view: str, against: str) -> frozenset[Need]:
        """What it asks of a view when it is used against another (or the same) one."""
        own = self.needs if view == against else frozenset[Need]()
        read = (stat.part.asks(view, against) for stat in self.stats)
        return own.union(self.also.get(view, frozenset[Need]()), *read)


@dataclass(frozen=True)
class Divergence(Part):
    """Disagreement of student and teacher at each step, nats; differentiable in the student.

    Attributes:
        not_pathwise: Why back-propagating it is wrong, for divergences where it is.
    """

    not_pathwise: str | None = None


@dataclass(frozen=True)
class Advantage(Part):
    """How much better than expected the written token was, nats; always used detached."""


@dataclass(frozen=True)
class Baseline(Part):
    """A value, nats, that does not depend on the token written: subtracting it from an advantage adds no bias."""


@dataclass(frozen=True)
class Quantity(Part):
    """Something to gate on or to watch."""


@dataclass(frozen=True)
class Weight(Part):
    """How much each step counts in a term; detached by the framework."""
