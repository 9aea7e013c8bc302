"""The passes with gradient that ranks make together, and the loss of each. Axis letters: see `retort.core`.

A round is one forward and backward pass on every rank. In most runs a rank computes the loss of its own steps, by a
head that is whole. `retort.train.learning.spread_head` has the other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.definition import Values
from retort.core.losses import TokenLoss, times
from retort.core.per_token import Core, loss_pass
from retort.core.signals import Candidates, Dense, TeacherSignal
from retort.core.steps import Steps
from retort.errors import RunError, SignalError
from retort.loss.terms import hidden_values, recorded_values, term_values, watch_values
from retort.train.learning.passes import Batch, Passes
from retort.train.storage.metrics import Stopwatch

#: The loss of some values of the steps in a slice, and the terms behind it.
Part = Callable[[Mapping[str, Tensor], slice], tuple[Tensor, dict[str, TokenLoss]]]


class Round:
    """One pass; this rank computes the loss of its own steps alone.

    Attributes:
        own: Sequences that this rank reads, by their place in the pack; none, where only other ranks have some left.
        own_N: Their steps.
        index_N: The steps whose loss this rank computes.
        chunk: Steps of a chunk of logits; None: as many as are best.
    """

    chunk: int | None = None

    def __init__(self, passes: Passes, batch: Batch, own: Sequence[int]) -> None:
        """Of some sequences of a batch."""
        self.passes, self.batch, self.own = passes, batch, own
        self.own_N = self.index_N = batch.pack.steps_in(own)

    def hidden(self) -> Tensor:
        """The student's hidden states at the rank's own steps, live."""
        return self.passes.hidden(self.batch.pack, self.own)

    def together(self, hidden_ND: Tensor) -> Tensor:
        """Of these, the hidden states at the steps whose loss is computed here, live."""
        return hidden_ND

    def core(self, values: Values) -> Core:
        """The loss core at these steps."""
        return self.passes.core(self.batch, self.index_N, values)

    def own_signals(self, core: Core) -> tuple[Mapping[str, TeacherSignal], Steps]:
        """The signals and the table at the rank's own steps, for terms that are computed there alone."""
        return core.signals, core.steps

    def cut(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of values at the steps whose loss is computed here, those at the rank's own."""
        return dict(values)

    def losses(self, every: Values, part: Part, own_part: Part, watch: Stopwatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the pass, live, and all values of the rank's own steps.

        Args:
            every: All that is computed of a step.
            part: The part of the loss from steps whose loss this rank computes.
            own_part: The part from its own steps.
            watch: Collects the times.
        """
        with watch("student"):
            hidden_ND = self.hidden()
        with watch("loss"), self.passes.lm.compute():
            core = self.core(every)
            together_ND = self.together(hidden_ND)
            loss, values = loss_pass(core, together_ND, lambda values, rows: part(values, rows)[0], chunk=self.chunk)
            values = self.cut(values)
            if outside := hidden_values(self.batch.method, hidden_ND, *self.own_signals(core), core.clock):
                loss, values = loss + own_part(outside, slice(None))[0], {**values, **outside}
        return loss, values

    def not_finite(self, values: Mapping[str, Tensor]) -> RunError:
        """The error for a loss that is not finite: it names the token, the rollout and the id."""
        batch = self.batch
        found = not_finite_at(batch, self.own, values)
        if found is None:
            return RunError(f"step {batch.clock.step + 1}: the loss is not finite; stopping before the update")
        term, view, step = found
        rollout = batch.pack.rollouts[int(batch.steps.rollout_N[step])]
        place_there = int(batch.share.local(torch.tensor(step)))
        ids = _banned(batch.signals[view], place_there, int(batch.steps.tokens_N[step]))
        names = ", ".join(f"{i} ({self.passes.lm.tokenizer.convert_ids_to_tokens(i)!r})" for i in ids[:3])
        banned = f"the teacher gives probability 0 to id {names}, which the student may generate"
        position = int(batch.steps.position_N[step])
        return RunError(
            f"step {batch.clock.step + 1}: term '{term}' is infinite at token {position} of a completion "
            f"of '{rollout.prompt.id}': {banned if ids else 'a value overflowed'}; stopping before the update "
            "(a forward KL or jsd stays finite where the teacher rules out an id)"
        )

    def loss(self, computed: Tensor, own: Tensor) -> Tensor:
        """The rank's part of the loss: what it computed, or what its own steps come to."""
        return computed


def gathered(passes: Passes, batch: Batch, micros: Sequence[Sequence[int]]) -> Iterator[Round]:
    """A round for each micro-batch of this rank, and idle passes while others have more."""
    spare = passes.spare(len(micros))
    for micro in micros:
        yield Round(passes, batch, micro)
    passes.idle(spare)


def every_value(batch: Batch) -> Values:
    """All that is computed of a chunk: the terms, the curves, and the columns of the record."""
    parts = (
        term_values(batch.method),
        watch_values(batch.watches),
        recorded_values(batch.method, {view: signal.offers for view, signal in batch.signals.items()}),
    )

    def every(context: Context) -> dict[str, Tensor]:
        return {name: value_C for part in parts for name, value_C in part(context).items()}

    return every


def selected(batch: Batch, index_N: Tensor, device: torch.device) -> tuple[dict[str, TeacherSignal], Steps]:
    """The rank's own signals and the table at some of its steps, on a device."""
    local_N = batch.share.local(index_N).to(device)
    signals = {name: signal.select(local_N) for name, signal in batch.signals.items()}
    return signals, batch.steps.select(index_N).to(device)


def not_finite_at(batch: Batch, own: Sequence[int], values: Mapping[str, Tensor]) -> tuple[str, str, int] | None:
    """Where a loss is not finite: the term, its view and the step in N; None where the values do not say.

    Args:
        batch: The batch.
        own: Sequences that were read, by their place in the pack.
        values: Of their steps, by name.
    """
    steps = batch.pack.steps_in(own)
    for term in batch.method.terms:
        weight_N, value_N = (values[f"{term.name}.{what}"].detach() for what in ("weight", "value"))
        bad = (~times(weight_N, value_N).isfinite()).nonzero()
        if len(bad) and batch.clock.at(term.coef) != 0:
            return term.name, term.against, int(steps[int(bad[0])])
    return None


def _banned(signal: TeacherSignal, step: int, token: int) -> list[int]:
    """Ids of probability 0 for the teacher at a step: the generated one, or all it can name."""
    if isinstance(signal, Dense):
        logp_V = signal.rows(torch.tensor([step])).logp_NV[0]
        banned = (logp_V == float("-inf")).nonzero().squeeze(-1).tolist()
        return [token] if token in banned else banned
    candidates = (
        signal.ids_NK[step][signal.logp_NK[step] == float("-inf")].tolist() if isinstance(signal, Candidates) else []
    )
    try:
        excluded = float(signal.rows(torch.tensor([step])).sampled_logp_N[0]) == float("-inf")
    except SignalError:
        return candidates
    return [token] if excluded else candidates
