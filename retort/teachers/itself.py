"""The student as its own teacher: one model, whose weights are changed while the teacher scores.

Only weights that learn are copied: every parameter of a student that learns as a whole, or the adapter where only that
learns. While the teacher scores, the copies replace the live tensors (a parameter is pointed at them, nothing is
copied), so there is never a second model. Axis letters: see `retort.core`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retort.core.head import Head
from retort.core.needs import DENSE, NeedKind
from retort.core.rollouts import Group
from retort.core.signals import Dense, Factors, TeacherSignal, as_compute
from retort.errors import SignalError, UserError
from retort.models.lm import LanguageModel
from retort.models.sharding import full, like, slice_of
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher, reduced
from retort.teachers.moving import Weights, frozen, live

_PREFIX = "moving/"


class OwnWeights:
    """The weights of all self-teachers of a run.

    Equal `Weights` share one copy; `live`, and the live side of a trust region, need none.
    """

    def __init__(self, lm: LanguageModel, wanted: Iterable[Weights], *, moves_within_batch: bool = False) -> None:
        """Takes the copies; the student must be as it is before training.

        Args:
            lm: The student.
            wanted: The weights of the method's views.
            moves_within_batch: Whether signals are still read after the weights have moved (several optimizer steps on
                a batch): they then keep a copy of those parts of the head that move.
        """
        self.lm = lm
        self.moves_within_batch = moves_within_batch
        self._updates = 0
        self._moves: dict[Weights, int] = {}
        self._kept: dict[Weights, list[Tensor]] = {}
        sides = dict.fromkeys(side for weights in wanted for side, _ in sides_of(weights))
        self._off = frozen() in sides and _adapter_does_nothing(lm)
        for side in sides:
            if side.kind != "live" and not (side == frozen() and self._off):
                self._kept[side] = [parameter.detach().clone() for parameter in self._learning.values()]

    @property
    def _learning(self) -> dict[str, torch.nn.Parameter]:
        return self.lm.trainable()

    @property
    def bytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.numel() * tensor.element_size() for kept in self._kept.values() for tensor in kept)

    @property
    def from_start(self) -> bool:
        """Whether a teacher has the student's weights before training, which a resumed run then has to load."""
        return self._off or frozen() in self._kept

    @contextlib.contextmanager
    def in_place(self, weights: Weights) -> Iterator[None]:
        """Puts the weights of one side of a self-teacher into the student's model, for the block."""
        if weights == frozen() and self._off:
            with self.lm.without_adapter():
                yield
            return
        kept = self._kept.get(weights)
        if kept is None:
            yield
            return
        learning = list(self._learning.values())
        if self.lm.sharding.on:  # layers are gathered from the slices themselves, so these are what changes
            with _exchanged(learning, kept):
                yield
            return
        before = [parameter.data for parameter in learning]
        _point(learning, kept)
        try:
            yield
        finally:
            _point(learning, before)

    def head(self, weights: Weights, *, lasting: bool) -> Callable[[], Head]:
        """A function that gives the current head, with these weights in place; to be called inside `in_place`.

        Args:
            weights: The weights in place.
            lasting: Whether the head is used after this moment.

        Returns:
            A function that gives the head; it raises `SignalError` if the weights moved meanwhile and no copy was kept.
        """
        head, moves = self.lm.head(), self._moved(weights)
        learning = {p.data_ptr() for p in self._learning.values()} if weights.kind != "frozen" else set[int]()
        moving = any(part is not None and part.data_ptr() in learning for part in head.parts)
        # Gathered weights are gone after this pass, whether they move or not.
        gathered = lasting and self.lm.sharding.on
        copied = gathered or (moving and lasting and self.moves_within_batch)
        narrow = torch.bfloat16 if self.lm.precision == "bf16" else None

        def part(tensor: Tensor) -> Tensor:
            if not gathered and (not copied or tensor.data_ptr() not in learning):
                return tensor.detach()
            # In the dtype of its products, to which they would be cast anyway.
            return tensor.detach().to(narrow or tensor.dtype, copy=True)

        now = head.each(part)

        def same() -> Head:
            if moving and not copied and self._moved(weights) != moves:
                raise SignalError(f"{self.lm.name}: the self-teacher's weights moved after it had scored this batch")
            return now

        return same

    def _moved(self, weights: Weights) -> int:
        """Number of times these weights have moved."""
        return self._updates if weights.kind == "live" else self._moves.get(weights, 0)

    @torch.no_grad()
    def moved(self, updates: int) -> None:
        """Updates the moving weights.

        Args:
            updates: Optimizer steps of the run, the last one included.
        """
        self._updates += 1
        self.lm.working.drop()  # also drops casts of the copies here, whose change the model's own tensors do not show
        for weights, kept in self._kept.items():
            if not weights.stateful or updates % weights.every:
                continue
            self._moves[weights] = self._moves.get(weights, 0) + 1
            for old, parameter in zip(kept, self._learning.values(), strict=True):
                old.lerp_(parameter.detach(), weights.update_rate)

    @torch.no_grad()
    def lags(self) -> dict[str, float]:
        """Distance of each moving teacher to the student: the norm of the difference over that of the student."""
        moving = {weights: kept for weights, kept in self._kept.items() if weights.stateful}
        found: dict[str, float] = {}
        for weights, kept in moving.items():
            pairs = list(zip(kept, self._learning.values(), strict=True))
            apart = sum(float(full((old - p.detach()).double().square().sum())) for old, p in pairs) ** 0.5
            size = sum(float(full(p.detach().double().square().sum())) for _, p in pairs) ** 0.5
            name = "teacher_lag" if len(moving) == 1 else f"teacher_lag/{_label(weights)}"
            found[name] = apart / size if size else 0.0
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint: weights that have moved. The run's updates tell when they move next."""
        return {
            f"{_PREFIX}{_label(weights)}/{name}": tensor
            for weights, kept in self._kept.items()
            if weights.stateful
            for name, tensor in zip(self._learning, kept, strict=True)
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores tensors of a checkpoint; tensors of other objects are ignored.

        Raises:
            UserError: They are of other teachers.
        """
        own = self.tensors()
        given = {name for name in tensors if name.startswith(_PREFIX)}
        if given != own.keys():
            wrong = sorted(given ^ own.keys())[0]
            raise UserError(f"the checkpoint is of a method whose self-teachers move otherwise (tensor '{wrong}')")
        for name, tensor in own.items():
            tensor.copy_(like(tensor, tensors[name]))
        self.lm.working.drop()

    def spread(self) -> None:
        """Keeps slices of the copies, as the student keeps of its weights; to be called after it was spread."""
        for kept in self._kept.values():
            kept[:] = [like(p, tensor) for p, tensor in zip(self._learning.values(), kept, strict=True)]


class SelfTeacher:
    """The student as a teacher of itself, with the weights that the view names."""

    capabilities: frozenset[NeedKind] = frozenset({"dense", "hidden"})

    def __init__(self, local: LocalTeacher, weights: OwnWeights) -> None:
        """Builds the teacher.

        Args:
            local: Scores with the student's model.
            weights: The weights of all self-teachers of the run.
        """
        self.local = local
        self.weights = weights
        self.name = f"{local.name} itself"

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        """See `Teacher`. A trust region scores twice, and mixes logits chunk by chunk."""
        sides = sides_of(request.view.weights)
        if len(sides) == 1:
            return self._side(groups, request, sides[0][0], lasting=request.whole)
        whole = replace(request, needs=frozenset({DENSE}), student_ids_NK=None)
        signals = [self._side(groups, whole, side, lasting=request.whole) for side, _ in sides]
        mixed = mix(signals, [share for _, share in sides])
        return mixed if request.whole else reduced(mixed, request.needs, request.student_ids_NK)

    def _side(self, groups: Sequence[Group], request: ScoreRequest, side: Weights, *, lasting: bool) -> TeacherSignal:
        with self.weights.in_place(side), self.local.lm.whole():
            return self.local.score(groups, request, head=self.weights.head(side, lasting=lasting))


def sides_of(weights: Weights) -> list[tuple[Weights, float]]:
    """The weights whose logits a self-teacher mixes, and their shares; a share of 0 is left out."""
    if weights.kind != "trust_region":
        return [(weights, 1.0)]
    shares = [(frozen(), 1.0 - weights.update_rate), (live(), weights.update_rate)]
    return [(side, share) for side, share in shares if share > 0]


def mix(signals: Sequence[TeacherSignal], coefs: Sequence[float]) -> Dense:
    r"""Mixes whole distributions by their logits, :math:`\sum_i c_i z_i`: a geometric mean, renormalised.

    Args:
        signals: Dense signals about the same steps.
        coefs: c, one for each signal.
    """
    parts = [signal for signal in signals if isinstance(signal, Dense)]
    assert len(parts) == len(signals) == len(coefs)

    def mixed(logits: Iterable[Tensor]) -> Tensor:
        each = iter(logits)
        mixed_CV = as_compute(next(each)) * coefs[0]
        for logits_CV, share in zip(each, coefs[1:], strict=True):
            mixed_CV = mixed_CV.add_(as_compute(logits_CV).to(mixed_CV.device), alpha=share)
        return mixed_CV

    factors = [part.factors for part in parts if part.factors is not None]
    widths = [factor.states(slice(0, 0)).shape[-1] for factor in factors]

    def states(rows: Tensor | slice) -> Tensor:
        return torch.cat([factor.states(rows) for factor in factors], -1)

    def logits_of(states_CS: Tensor, ids: slice) -> Tensor:
        each = zip(factors, states_CS.split(widths, -1), strict=True)
        return mixed(factor.logits(own_CD, ids) for factor, own_CD in each)

    return replace(
        parts[0],
        logits=lambda rows: mixed(part.logits(rows) for part in parts),
        hidden=None,  # a mix has no hidden states
        factors=Factors(states, logits_of) if len(factors) == len(parts) else None,
    )


def _point(parameters: Iterable[torch.nn.Parameter], tensors: Iterable[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor


@contextlib.contextmanager
def _exchanged(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, the parameters hold the values of the tensors; of both, each rank has a slice."""
    mine = [slice_of(parameter.detach()) for parameter in parameters]
    before = [own.clone() for own in mine]
    with torch.no_grad():
        for own, tensor in zip(mine, tensors, strict=True):
            own.copy_(slice_of(tensor))
    try:
        yield
    finally:
        with torch.no_grad():
            for own, value in zip(mine, before, strict=True):
                own.copy_(value)


def _label(weights: Weights) -> str:
    return f"{weights.kind}-{weights.update_rate}-{weights.every}"


@torch.no_grad()
def _adapter_does_nothing(lm: LanguageModel) -> bool:
    """Whether the student has an adapter that changes nothing yet: switched off, it is the original student."""
    if lm.adapter is None:
        return False
    ids_RL = torch.arange(1, 5, device=lm.device)[None] % lm.head().width

    def logits() -> Tensor:
        return lm.head().logits(lm.model.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state)

    with lm.compute():
        with_it = logits()
        with lm.without_adapter():
            return torch.equal(with_it, logits())
