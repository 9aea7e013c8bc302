"""The student's head in the loss of several ranks, each of which keeps its slice of the ids. Axes: see `retort.core`.

The weights of a head are spread by rows, that is by ids. So a rank's slice is a `VocabShard` as it is: nothing of the
head has to be gathered, and no rank forms a gradient of all of it. Instead all ranks compute the loss of the steps of
all of them, each its ids: they exchange hidden states, and what the teachers said at these steps.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, distributed

from retort.core.definition import Values
from retort.core.head import Head
from retort.core.per_token import Core, chunk_rows, loss_pass
from retort.core.shard import VocabShard
from retort.core.signals import Candidates, Dense, Differing, Sampled, TeacherSignal, TopK
from retort.core.steps import Steps
from retort.errors import SignalError, UserError
from retort.models.sharding import bounds
from retort.train.learning.passes import Batch, Passes
from retort.train.learning.rounds import Round, every_value, gathered, selected

#: Steps of each rank at which both ways are compared before the second one is taken.
_TRIED = 16
#: How many of the compared steps must agree; a threshold in a method may fall on its other side by rounding.
_AGREE = 0.75


def rounds(passes: Passes, batch: Batch, rollouts: Sequence[int]) -> Iterator[Round]:
    """The passes with gradient over some rollouts, all ranks in step; of each rank, over its own.

    Args:
        passes: The student, and how ranks divide its head.
        batch: The scored rollouts.
        rollouts: By their place in the pack, the same on all ranks.

    Raises:
        UserError: `ranks.head` asks for slices, and this method or its signals cannot be computed on them.
    """
    micros = passes.micro_batches(batch.pack, batch.share.own(rollouts))
    if passes.world.size == 1 or not sliced(passes, batch):
        yield from gathered(passes, batch, micros)
        return
    plans = passes.world.each(lambda: micros)
    for place in range(max(map(len, plans))):
        yield SlicedRound(passes, batch, [plan[place] if place < len(plan) else [] for plan in plans])


def exchanged(vocab: int, width: int, states: int, tokens: int, ranks: int) -> tuple[float, float]:
    r"""How many numbers a rank receives in a pass with gradient: with the head gathered, and with its slices.

    Gathering brings the head, and summing its gradient as much again: :math:`2 V D (r - 1) / r` for r ranks. By slices
    come the hidden states of T steps of each other rank, the states behind the teachers' logits (S numbers a step), and
    the gradient of the hidden states, which is summed and so sent twice: :math:`T (r - 1) (3 D + S)`. The same numbers
    are what a rank has to hold, so the smaller side is the better one in both. A few numbers a step are left out.

    Args:
        vocab: V, rows of the head.
        width: D, of the student's hidden states.
        states: S, numbers a step that teachers' logits are made of; 0 where they give a few numbers of each step.
        tokens: T, the most steps of one rank's pass (`optimizer.batch_tokens`).
        ranks: r.
    """
    return 2.0 * vocab * width * (ranks - 1) / ranks, tokens * (ranks - 1.0) * (3.0 * width + states)


def sliced(passes: Passes, batch: Batch) -> bool:
    """Whether the ranks compute this batch on slices of the head; by settings and method, not by what was generated.

    Raises:
        UserError: See `rounds`.
    """
    use = passes.head
    if use.setting == "gathered":
        return False
    key = (id(batch.method), *(watch.name for watch in batch.watches))
    if key not in use.decided:
        use.decided[key] = _decided(passes, batch)
    return use.decided[key]


def _decided(passes: Passes, batch: Batch) -> bool:
    """Decides once for a method and its curves, and notes why."""
    use, world, (vocab, width) = passes.head, passes.world, passes.lm.kept_head().weight_VD.shape
    kinds = world.each(lambda: {view: _kind(signal) for view, signal in batch.signals.items()})
    states = sum(kind.states for kind in kinds[0].values() if kind is not None)
    whole, parts = exchanged(vocab, width, states, passes.batch_tokens, world.size)
    reason = f"a pass exchanges at most {parts:,.0f} numbers with slices, {whole:,.0f} with the whole"
    on_slices = use.setting == "vocabulary" or parts <= whole
    obstacle = _obstacle(passes, batch, kinds, vocab) if on_slices else None
    if obstacle is not None and use.setting == "vocabulary":
        raise UserError(f"ranks.head=vocabulary: {obstacle}; set ranks.head=gathered")
    on_slices = on_slices and obstacle is None
    how = "keeps its slice of" if on_slices else "gathers"
    use.note(f"every rank {how} the student's head in the loss of '{batch.method.name}': {obstacle or reason}")
    return on_slices


def _obstacle(passes: Passes, batch: Batch, kinds: Sequence[Mapping[str, _Kind | None]], vocab: int) -> str | None:
    """Why a batch cannot be computed on slices; None if it can. All ranks find the same, from their signals by rank."""
    world = passes.world
    empty = [rank for rank in range(world.size) if bounds(vocab, world.size, rank).start >= passes.vocab]
    if empty:
        return f"rank {empty[0]} would keep none of the {passes.vocab} ids that student and teachers share"
    for view, kind in kinds[0].items():
        if kind is None:
            return f"the signal of '{view}' does not say what its logits are made of"
        if any(other[view] != kind for other in kinds):
            return f"the signals of '{view}' are not alike on all ranks"
    agree_N = _compared(passes, batch)
    if isinstance(agree_N, str):
        return agree_N
    found = world.each(lambda: (int(agree_N.sum()), len(agree_N)))
    agree, count = sum(one for one, _ in found), sum(one for _, one in found)
    return None if agree >= _AGREE * count else f"method '{batch.method.name}' comes to other numbers on slices"


def _compared(passes: Passes, batch: Batch) -> Tensor | str:
    """Whether both ways agree in all values and in their gradient, bool [N] at a few steps of this rank.

    Text, the same on all ranks, where something that is computed needs all ids at once.
    """
    lm, world, every = passes.lm, passes.world, every_value(batch)
    own, few = batch.pack.sequences_of(batch.share.own(range(len(batch.pack.rollouts)))), list[int]()
    while own[len(few) :] and len(batch.pack.steps_in(few)) < _TRIED:
        few.append(own[len(few)])
    with lm.whole():
        head = lm.head().each(Tensor.detach)
        mine = bounds(head.width, world.size, world.rank)
        sliced_round = SlicedRound(passes, batch, world.each(lambda: few), lambda: head.rows(mine))
        with torch.no_grad():
            hidden_ND = sliced_round.hidden()
        with lm.compute():
            one = world.each(lambda: _numbers(Round(passes, batch, few), every, hidden_ND))[world.rank]
            try:
                other = _numbers(sliced_round, every, hidden_ND)
            except SignalError as error:
                return str(error)
    agree_N = torch.ones(len(hidden_ND), dtype=torch.bool)
    rough = 1e-3 if lm.precision == "fp32" else 5e-2
    for whole_N, parts_N in zip(one, other, strict=True):
        usual = float(whole_N[whole_N.isfinite()].abs().mean().nan_to_num(0.0))
        agree_N &= torch.isclose(whole_N, parts_N, rtol=rough, atol=rough * usual + 1e-6, equal_nan=True)
    return agree_N


def _numbers(tried: Round, every: Values, hidden_ND: Tensor) -> list[Tensor]:
    """All values at the rank's own steps of a round, and the norm of their gradient, [N] each."""
    with torch.enable_grad():
        leaf_ND = hidden_ND.detach().clone().requires_grad_()
        core = tried.core(every)
        core = replace(core, head=None if core.head is None else core.head.each(Tensor.detach))
        loss, values = loss_pass(core, tried.together(leaf_ND), _plain_sum, chunk=tried.chunk)
        loss.backward()
    assert leaf_ND.grad is not None
    return [x.detach().double().cpu() for x in (*tried.cut(values).values(), leaf_ND.grad.norm(dim=-1))]


def _plain_sum(values: Mapping[str, Tensor], rows: slice) -> Tensor:
    live = [value_N.nan_to_num(0.0, 0.0, 0.0).sum() for value_N in values.values() if value_N.requires_grad]
    return torch.stack(live).sum()


class SlicedRound(Round):
    """One pass in which every rank computes the loss of the steps of all ranks, each over its ids."""

    def __init__(
        self,
        passes: Passes,
        batch: Batch,
        plan: Sequence[Sequence[int]],
        head: Callable[[], Head] | None = None,
    ) -> None:
        """Of some sequences of each rank, which may have none.

        Args:
            passes: The student.
            batch: The scored rollouts.
            plan: By rank, sequences by their place in the pack; the same on all ranks.
            head: Gives the rank's rows of the head.
        """
        super().__init__(passes, batch, plan[passes.world.rank])
        each = [batch.pack.steps_in(own) for own in plan]
        self.index_N = torch.cat(each)
        self.counts = [len(own_N) for own_N in each]
        self.head = head or passes.lm.own_head
        vocab, world = passes.lm.kept_head().width, passes.world
        self.ids = bounds(vocab, world.size, world.rank)
        # The same on all ranks. A chunk is one block here, of which autograd keeps more than a product (`blocks`).
        kept = 1 if passes.lm.device.type == "cuda" else 4
        self.chunk = chunk_rows(kept * bounds(vocab, world.size, 0).stop, passes.lm.device)
        self._own = selected(batch, self.own_N, passes.lm.device)

    def hidden(self) -> Tensor:
        return super().hidden() if self.own else self.passes.lm.no_steps()

    def together(self, hidden_ND: Tensor) -> Tensor:
        """The rows of all ranks, in order of rank; each gets the gradient of its own."""
        return _Together.apply(hidden_ND, self.counts, self.passes.world.rank)  # pyright: ignore[reportReturnType]

    def core(self, values: Values) -> Core:
        batch, shared = self.batch, min(self.ids.stop, self.passes.vocab)
        shard = VocabShard(self.ids.start)
        steps = batch.steps.select(self.index_N).to(self.passes.lm.device)
        ids = slice(self.ids.start, shared)
        signals = {view: self._of_all(view, signal, steps, ids, shard) for view, signal in self._own[0].items()}
        head = replace(self.head(), shard=shard)
        return Core(values, steps, batch.clock, signals, head, shared - ids.start, batch.method.temperature)

    def own_signals(self, core: Core) -> tuple[Mapping[str, TeacherSignal], Steps]:
        return self._own

    def cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = sum(self.counts[: self.passes.world.rank])
        return {name: value_N[start : start + len(self.own_N)] for name, value_N in values.items()}

    def loss(self, computed: Tensor, own: Tensor) -> Tensor:
        """All ranks compute the same loss, of the steps of all; each counts its own."""
        return own

    def _of_all(self, view: str, signal: TeacherSignal, steps: Steps, ids: slice, shard: VocabShard) -> TeacherSignal:
        """What the teachers of all ranks said about this round's steps; of whole distributions, the rank's ids."""
        signal.check_tokens(self._own[1].tokens_N)
        valid_N = self.batch.valid[view]
        valid_N = None if valid_N is None else valid_N[self.index_N].to(steps.tokens_N.device)
        return self._joined(signal, steps.tokens_N, valid_N, ids, shard)

    def _joined(
        self, signal: TeacherSignal, tokens_N: Tensor, valid_N: Tensor | None, ids: slice, shard: VocabShard
    ) -> TeacherSignal:
        if isinstance(signal, Dense):
            factors = signal.factors
            assert factors is not None
            states_NS = self._rows_of_all(factors.states(slice(0, signal.steps)))
            return Dense(
                tokens_N,
                signal.source,
                lambda rows: factors.logits(states_NS[rows], ids),
                ids.stop - ids.start,
                signal.temperature,
                shard,
                valid_N=valid_N,
            )
        changed: dict[str, Any] = {"tokens_N": tokens_N, "valid_N": valid_N}
        for name in _columns(signal):
            found = getattr(signal, name)
            of_signal = isinstance(found, TeacherSignal)
            changed[name] = (
                self._joined(found, tokens_N, valid_N, ids, shard) if of_signal else self._rows_of_all(found)
            )
        return replace(signal, **changed)

    def _rows_of_all(self, own: Tensor) -> Tensor:
        return torch.cat(_gathered(own, self.counts))


class _Together(torch.autograd.Function):
    """The rows of all ranks. Of the gradient, which is that of all ranks' losses already, each takes its own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat(_gathered(own, counts))

    @staticmethod
    def backward(ctx: Any, of_all: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return of_all[ctx.mine], None, None


def _gathered(own: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Some rows of each rank, of which this rank gives its own; sent filled up to the same number."""
    filled = own.new_zeros(max(counts), *own.shape[1:])
    filled[: len(own)] = own.detach()
    found = [torch.empty_like(filled) for _ in counts]
    distributed.all_gather(found, filled)
    return [rows[:count] for rows, count in zip(found, counts, strict=True)]


@dataclass(frozen=True)
class _Kind:
    """The form of a signal, which ranks must share to exchange it.

    Attributes:
        form: Its columns, with type and width.
        states: Numbers a step that its logits are made of.
    """

    form: tuple[Any, ...]
    states: int = 0


def _kind(signal: TeacherSignal) -> _Kind | None:
    """The form of a signal; None of one that ranks cannot exchange."""
    if isinstance(signal, Dense):
        if signal.factors is None:
            return None
        states_NS = signal.factors.states(slice(0, 0))
        return _Kind(("dense", states_NS.shape[1], states_NS.dtype), states_NS.shape[1])
    if type(signal) not in (Sampled, TopK, Candidates, Differing):
        return None
    form, states = list[Any]([type(signal).__name__]), 0
    for name in _columns(signal):
        found = getattr(signal, name)
        if not isinstance(found, TeacherSignal):
            form.append((name, (found.shape[1:], found.dtype)))
            continue
        inner = _kind(found)
        if inner is None:
            return None
        form.append((name, inner))
        states += inner.states
    return _Kind(tuple(form), states)


def _columns(signal: TeacherSignal) -> list[str]:
    """Names of what a signal says of each step."""
    names = [one.name for one in fields(signal) if one.name not in ("tokens_N", "valid_N")]
    return [name for name in names if isinstance(getattr(signal, name), Tensor | TeacherSignal)]
