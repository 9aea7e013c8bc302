"""The protocol of teachers. Axis letters: see `retort.core`.

Any object with a `score` like this one is a teacher: a model in this process, the student itself, a server. The
contract of all teachers is `tests/contracts/test_teacher.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from retort.core.needs import Capability, Need, NeedKind, can_meet
from retort.core.rollouts import Group, Pack
from retort.core.sequences import TokenSequence
from retort.core.signals import TeacherSignal
from retort.errors import SignalError
from retort.teachers.view import View


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """A request to score some rollouts.

    Attributes:
        view: The view of the rollouts.
        needs: The quantities to return for every step, and no more.
        temperature: Temperature of the distributions.
        student_ids_NK: For the need `logp_at`: the student's most likely ids at every step, int64, on the CPU. None
            where the teacher can give its whole distribution, which then meets that need. For the need `lookahead`
            they are given to every teacher.
        ahead_N: For the need `lookahead`: the steps at which it is needed, bool, on the CPU; None: at all.
    """

    view: View
    needs: frozenset[Need]
    temperature: float = 1.0
    student_ids_NK: Tensor | None = None
    ahead_N: Tensor | None = None

    @property
    def ahead(self) -> int:
        """The number of candidates after which to look one token ahead; 0 for none."""
        return most_ahead(self.needs)

    @property
    def whole(self) -> bool:
        """Whether only a whole distribution, or the hidden states that make one, meets the needs.

        In one vocabulary it meets the need for spans, too.
        """
        kinds = {need.kind for need in self.needs}
        scored = set[NeedKind]() if self.student_ids_NK is not None else {"logp_at"}
        return not kinds.isdisjoint({"dense", "hidden", "spans"} | scored)


def most_ahead(needs: Iterable[Need]) -> int:
    """The number of the student's ids after which the needs look one token ahead; 0 for none."""
    return max((need.k for need in needs if need.kind == "lookahead"), default=0)


class Teacher(Protocol):
    """A teacher, which scores the tokens of rollouts."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The needs that it can meet: kinds, or a `Need` with the largest k of that kind."""
        ...

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        """Scores every step of some rollouts.

        Args:
            groups: The rollouts; views may read the others of a group. The steps are theirs in this order, as `Pack.of`
                lays them end to end.
            request: The request. `student_ids_NK` is about the same steps.

        Returns:
            A signal about exactly the decided tokens, detached, with `valid_N` False where the view has no context. It
            may be on any device: it is moved where it is read.

        Raises:
            SignalError: Its numbers are not finite.
        """
        ...


@runtime_checkable
class Remote(Protocol):
    """A teacher, or the model behind one, that another process holds: it may have been exchanged since it was asked.

    Attributes:
        scores: What it said of a fixed probe at the start, log-probs in nats.
    """

    scores: list[float]

    def listen(self, say: Callable[[str], object]) -> None:
        """Has `say` take a line for the user where the other process is waited for."""
        ...

    def verify(self, tolerance: float, before: Sequence[float] | None = None) -> None:
        """Checks that it is the same model.

        Args:
            tolerance: Nats by which log-probs of the probe may differ on average.
            before: What it said of the probe earlier; None: `scores`.

        Raises:
            UserError: It is another one.
            UnreachableError: It does not answer.
        """
        ...


@dataclass(frozen=True, eq=False)
class Read:
    """What a teacher reads of some rollouts before it scores them.

    Attributes:
        sequences: By rollout, its sequences as the teacher reads them, in its own ids; None where there is no context.
        interpretation: What else its numbers depend on besides its model and the request, as a text: how its ids are
            the student's.
        counts: See `TeacherSignal.counts`.
    """

    sequences: Sequence[tuple[TokenSequence, ...] | None]
    interpretation: str
    counts: Mapping[str, float]


class CacheableTeacher(Teacher, Protocol):
    """A teacher that can tell what it would read, so that its scores can be stored (`retort.cache`)."""

    def read(self, groups: Sequence[Group], view: View) -> Read:
        """What it reads of some rollouts; nothing is computed with its model."""
        ...


def view_signals(
    teachers: Mapping[str, Teacher],
    views: Mapping[str, View],
    groups: Sequence[Group],
    needs: Callable[[str], frozenset[Need]],
    temperature: float,
    student_ids: Callable[[int], Tensor],
    student_entropy: Callable[[], Tensor] | None = None,
) -> dict[str, TeacherSignal]:
    """Returns every view's signal about some rollouts, checked to be about their very tokens.

    Args:
        teachers: The teachers, by view.
        views: The views, by name.
        groups: The rollouts.
        needs: Gives the needs of a view's teacher.
        temperature: Temperature of the distributions.
        student_ids: Gives the student's k most likely ids at every step, [N, K]. Called once where a teacher without a
            whole distribution has to score them or some teacher looks ahead, and else not at all.
        student_entropy: Gives the student's entropy at every step, nats, [N], to look ahead only where that is needed.
            None: everywhere. Called once where some teacher looks ahead.

    Raises:
        SignalError: A signal is about other tokens or ids, or lacks a need.
    """
    asked = {name: needs(name) for name in views}
    counts = {name: _given_ids(teachers[name], own) for name, own in asked.items()}
    most = max(counts.values(), default=0)
    ids_NK = student_ids(most) if most else None
    tokens_N = Pack.of([rollout for group in groups for rollout in group]).steps.tokens_N
    above = min((need.above for own in asked.values() for need in own if need.kind == "lookahead"), default=None)
    ahead_N = None if above is None or student_entropy is None else student_entropy().cpu() > above
    found: dict[str, TeacherSignal] = {}
    for name, view in views.items():
        own_NK = ids_NK[:, : counts[name]] if ids_NK is not None and counts[name] else None
        signal = teachers[name].score(groups, ScoreRequest(view, asked[name], temperature, own_NK, ahead_N))
        signal.check_tokens(tokens_N)
        if own_NK is not None:
            signal.check_ids(own_NK)
        for need in sorted(asked[name]):
            if not can_meet(signal.offers, need):
                raise SignalError(f"{signal.source}: was asked for {need}, and gave only: {', '.join(signal.offers)}")
        found[name] = signal
    return found


def _given_ids(teacher: Teacher, needs: frozenset[Need]) -> int:
    """The number of the student's ids that a teacher has to get at every step."""
    ahead = most_ahead(needs)
    if not teacher.capabilities.isdisjoint({"dense", "spans"}):
        return ahead
    return max((need.k for need in needs if need.kind == "logp_at"), default=ahead)
