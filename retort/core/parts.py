"""The small pure functions that a method is composed of, each with its needs of a teacher.

A part is evaluated on one chunk of steps at a time: `part.value(context, view)` returns one number per step, [N].
The subclasses are slots without behaviour: they keep a weight from being passed where a divergence belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.steps import Clock, Steps
from retort.errors import UserError


@dataclass(frozen=True)
class Stat:
    """A number per step that depends on other steps: it is taken over the whole batch before the first update.

    A part that uses it reads `context.steps.stored[name]`, and lists it in its `stats`.

    Attributes:
        name: Name under which it is stored; two of one name must be the same.
        part: Evaluated at each step first; None where only positions, rewards or groups matter.
        finish: (the part's values at all steps, the steps, the clock) -> [N]. If the part needs anything of a view,
            steps of rollouts without a context under that view are left out, and 0 is stored for them. Without a part,
            the values are zeros. The statistics before it are in `steps.stored`.
        sentences: Whether it needs the sentences.
        rewards: Whether it needs rewards.
        groups: Whether it compares the rollouts of one prompt.
        contexts: Views of which it reads where they have a context: `steps.stored["context.<view>"]`, bool [N].
    """

    name: str
    part: Part | None
    finish: Callable[[Tensor, Steps, Clock], Tensor]
    sentences: bool = False
    rewards: bool = False
    groups: bool = False
    contexts: tuple[str, ...] = ()


def per_step(what: str, values_N: Tensor, steps: Steps) -> Tensor:
    """Returns the values; raises `UserError`, which names `what`, unless they are one number per step."""
    if values_N.shape != steps.tokens_N.shape:
        raise UserError(f"{what} gave {tuple(values_N.shape)} for {len(steps)} steps; give one number per step, [N]")
    return values_N


def unchanged(values_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
    """The `finish` of a statistic that is the part's own value, taken before the first update."""
    return values_N


@dataclass(frozen=True)
class Part:
    """A function of the context that gives one number per step.

    Attributes:
        name: Readable name, with its settings.
        value: (context, view) -> [N].
        needs: Needs of the view's teacher.
        also: Needs of other views, by name.
        stats: Statistics of the whole batch that it reads.
        uses_old_logp: Whether it compares the student with itself before the first update on a batch; read for a term's
            estimator and weight.
        from_sample: Whether it estimates what it is differentiated as from the sampled token, without its probability:
            right only for tokens that the student drew as it is.
        whole_support: Whether it holds only for tokens drawn from the student's whole distribution at the loss
            temperature, so that a plan with another way to draw is refused.
        student_needs: What it needs of the student's policy beyond the log-prob of what was decided, and beyond what
            its needs of teachers say: a number over a vocabulary, which a denoising step does not have.
    """

    name: str
    value: Callable[[Context, str], Tensor]
    needs: frozenset[Need] = frozenset()
    also: Mapping[str, frozenset[Need]] = field(default_factory=lambda: {})
    stats: tuple[Stat, ...] = ()
    uses_old_logp: bool = field(default=False, kw_only=True)
    student_needs: frozenset[Need] = field(default=frozenset(), kw_only=True)
    from_sample: bool = field(default=False, kw_only=True)
    whole_support: bool = field(default=False, kw_only=True)

    def at(self, context: Context, view: str) -> Tensor:
        """Returns its value at the steps of a context.

        Raises:
            UserError: It is not one number per step, which would silently be multiplied with other steps' numbers.
        """
        return per_step(f"'{self.name}'", self.value(context, view), context.steps)

    def needs_of(self, view: str, against: str) -> frozenset[Need]:
        """Returns its needs of a view when it is used against another view, or the same one."""
        own = self.needs if view == against else frozenset[Need]()
        read = (stat.part.needs_of(view, against) for stat in self.stats if stat.part is not None)
        return own.union(self.also.get(view, frozenset[Need]()), *read)


@dataclass(frozen=True)
class Divergence(Part):
    """Disagreement of student and teacher at each step, nats; differentiable in the student.

    Attributes:
        not_pathwise: The reason why back-propagating it is wrong, for divergences where it is.
    """

    not_pathwise: str | None = None


@dataclass(frozen=True)
class Advantage(Part):
    """How much better than expected the sampled token was, nats; always used detached.

    Attributes:
        reads_student: Whether it reads the live student beyond what `old_logp` says of it, so that it must be taken
            before the first of several updates on a batch.
    """

    reads_student: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Baseline(Part):
    """A value, nats, that does not depend on the sampled token: subtracting it from an advantage adds no bias."""


@dataclass(frozen=True)
class Quantity(Part):
    """A number per step to gate on or to watch."""


@dataclass(frozen=True)
class Weight(Part):
    """The weight of each step in a term; detached by the framework.

    Attributes:
        corrects_engine: Whether it corrects for a rollout engine whose probabilities differ from the trainer's.
    """

    corrects_engine: bool = field(default=False, kw_only=True)
