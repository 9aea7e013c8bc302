"""The loss core: hidden states in, one number per step out, and never a whole [N, V]. Axis letters: see `retort.types`.

Steps are cut into chunks, large enough for the matrix products; a chunk's logits are cut into blocks of rows, small
enough for the cache, on which a method is evaluated by autograd exactly as it is written. What flows back to the
block's logits overwrites them, and two more products carry it to hidden states and head. So memory does not grow with
N, nor with the number of terms, and no term needs code of its own to be cheap.

`loss_pass` does all of that at once, for a loss whose scalar is known as it goes: four products. `per_token` gives the
values first and computes the logits again when their gradient arrives: six. `dense`, the plain version, is the
definition of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from retort.context import Context
from retort.models.chunked import Chunked, Pass, cuts
from retort.models.head import Head
from retort.signals import SignalRows, TeacherSignal, as_compute

#: Elements of one chunk of logits, 160 MB in fp32: at a vocabulary of 150,000 some 260 steps, below which reading the
#: head takes as long as multiplying by it.
CHUNK_ELEMENTS = 40_000_000
#: Elements of a block on a CPU, 2 MB in fp32: what autograd keeps of it stays in the cache.
BLOCK_ELEMENTS = 2**19
#: Below this, everything at once by plain autograd is fastest.
DENSE_ELEMENTS = 2**22

Values = Callable[[Context], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Steps:
    """What is known about the N steps besides the models' outputs. All tensors are [N]."""

    tokens_N: Tensor
    stored: Mapping[str, Tensor]
    engine_logp_N: Tensor | None = None
    rollout_N: Tensor | None = None
    turn_N: Tensor | None = None
    position_N: Tensor | None = None
    step: int = 0
    total_steps: int | None = None
    readings: Mapping[str, float] = field(default_factory=lambda: {})

    def rows(self, rows: slice) -> Steps:
        """Some of the steps."""
        cut: Callable[[Tensor | None], Tensor | None] = lambda values: None if values is None else values[rows]  # noqa: E731
        return replace(
            self,
            tokens_N=self.tokens_N[rows],
            stored={name: values[rows] for name, values in self.stored.items()},
            engine_logp_N=cut(self.engine_logp_N),
            rollout_N=cut(self.rollout_N),
            turn_N=cut(self.turn_N),
            position_N=cut(self.position_N),
        )


@dataclass(frozen=True, eq=False)
class Core:
    """A function of `Context` with all that it is evaluated on, but for the hidden states.

    Attributes:
        values: Function of a block's context to named numbers per step, [C] each.
        steps: What else is known about the steps.
        signals: The teachers' answers, by view; each must be about exactly these tokens.
        head: The student's head; None if what it is given are the logits [N, V] themselves.
        vocab: Ids that student and teachers share; all others get no probability. On a rank that holds only some of
            the ids, how many of its own are shared.
        temperature: Student logits are divided by it.
    """

    values: Values
    steps: Steps
    signals: Mapping[str, TeacherSignal]
    head: Head | None
    vocab: int
    temperature: float = 1.0

    @property
    def count(self) -> int:
        """N."""
        return len(self.steps.tokens_N)

    def blocks(self, size: int, device: torch.device) -> list[slice]:
        """Cuts a chunk of some size; ranks that share a vocabulary exchange a few numbers per block, so have one."""
        spread = self.head is not None and self.head.shard.spread
        return cuts(size, size if spread else block_rows(self.vocab, device))

    def evaluate(
        self, product_CV: Tensor, steps: Steps, signals: Mapping[str, TeacherSignal], rows: slice
    ) -> dict[str, Tensor]:
        """The values of some steps from the student's product [C, V], differentiable in it."""
        logits_CV = product_CV if self.head is None else self.head.shape(product_CV)
        if self.temperature != 1.0:
            logits_CV = as_compute(logits_CV) / self.temperature  # not in bf16: the teacher's are divided in fp32, too
        cut = steps.rows(rows)
        context = Context(
            student_logits_NV=logits_CV,
            tokens_N=cut.tokens_N,
            signals={name: signal.rows(rows, self.vocab) for name, signal in signals.items()},
            stored=cut.stored,
            engine_logp_N=cut.engine_logp_N,
            rollout_N=cut.rollout_N,
            turn_N=cut.turn_N,
            position_N=cut.position_N,
            step=cut.step,
            total_steps=cut.total_steps,
            readings=cut.readings,
        )
        if self.head is not None:
            context.shard = self.head.shard
        return self.values(context)

    def dense(self, hidden_ND: Tensor) -> dict[str, Tensor]:
        """All steps at once, by plain autograd. The definition."""
        product_NV = hidden_ND[:, : self.vocab] if self.head is None else self._product(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # products may be in bf16, a softmax may not
            return self.evaluate(product_NV, self.steps, self.signals, slice(0, self.count))

    def _product(self, hidden_ND: Tensor) -> Tensor:
        assert self.head is not None
        return replace(self.head, scale=1.0, soft_cap=None).logits(hidden_ND, self.vocab)


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Steps of a chunk; on a GPU, whose products want larger ones, four times as many."""
    return max(1, CHUNK_ELEMENTS * (4 if device.type == "cuda" else 1) // vocab)


def block_rows(vocab: int, device: torch.device) -> int:
    """Steps of a block; on a GPU, which gains nothing from small ones, those of a chunk."""
    return chunk_rows(vocab, device) if device.type == "cuda" else max(1, BLOCK_ELEMENTS // vocab)


def in_blocks(signal: TeacherSignal, vocab: int) -> Iterator[SignalRows]:
    """A signal's answers to all its steps, products by the chunk and all else by the block."""
    device = signal.tokens_N.device
    for chunk in cuts(signal.steps, chunk_rows(vocab, device)):
        held = signal.held(chunk, vocab)
        for block in cuts(held.steps, block_rows(vocab, device)):
            yield held.rows(block, vocab)


def per_token(core: Core, hidden_ND: Tensor, *, chunk: int | None = None) -> dict[str, Tensor]:
    """The values of every step, without ever holding all logits.

    Args:
        core: What is evaluated.
        hidden_ND: The student's hidden states, or its logits.
        chunk: Steps per chunk; None picks. If it is N or more, this is `Core.dense`.

    Returns:
        Named values [N], differentiable in the hidden states and in the head's parts.

    Raises:
        SignalError: A signal is misaligned, not finite or poorer than what is asked of it.
    """
    return _run(core, hidden_ND, None, chunk)[1]


def loss_pass(
    core: Core, hidden_ND: Tensor, loss: Callable[[Mapping[str, Tensor], slice], Tensor], *, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that is a sum over steps, its gradient formed on the way.

    Args:
        core: What is evaluated.
        hidden_ND: The student's hidden states, or its logits.
        loss: (values of some steps, which steps) -> their part of the loss, a scalar.
        chunk: As in `per_token`.

    Returns:
        The loss, differentiable in the hidden states and in the head's parts; and all values, [N] each, as `per_token`
        gives them: whoever differentiates those pays for computing the logits again, nobody else does.

    Raises:
        SignalError: As in `per_token`.
    """
    total, values = _run(core, hidden_ND, loss, chunk)
    assert total is not None
    return total, values


def _run(
    core: Core, hidden_ND: Tensor, loss: Callable[..., Tensor] | None, chunk: int | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    for signal in core.signals.values():
        signal.check_tokens(core.steps.tokens_N)
    small = core.count <= chunk if chunk else core.count * core.vocab <= DENSE_ELEMENTS
    if core.head is None or core.count == 0 or (small and not core.head.shard.spread):
        values = core.dense(hidden_ND)
        return (None if loss is None else loss(values, slice(0, core.count))), values
    pass_ = Pass(core, loss, chunk or chunk_rows(core.vocab, hidden_ND.device), _product_dtype(hidden_ND))
    total, *found = Chunked.apply(pass_, hidden_ND, *core.head.parts)  # pyright: ignore[reportGeneralTypeIssues]
    return (None if loss is None else total), dict(zip(pass_.names, found, strict=True))


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
