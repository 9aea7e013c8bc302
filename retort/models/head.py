"""The loss core: hidden states in, one number per step out, and never a whole [N, V]. Axis letters: see `retort.types`.

`per_token` evaluates a function of `Context` over chunks of the steps. The dense version is the same code with one
chunk and nothing recomputed, so the two cannot disagree on anything but rounding. Larger inputs are cut into chunks
whose logits are thrown away and computed again in the backward pass: memory then does not grow with N times V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from retort.context import Context
from retort.signals import TeacherSignal, as_compute

#: Elements of one chunk of logits: 64 MiB in fp32, of which a divergence holds several at once.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight_VD: Rows are ids; rows at or beyond the shared vocabulary are padding and get no probability.
        bias_V: Optional.
        scale: Logits are multiplied by it (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        soft_cap: Logits are cap * tanh(logits / cap) (Gemma).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def width(self) -> int:
        """V, padding included."""
        return self.weight_VD.shape[0]

    def logits(self, hidden_CD: Tensor, vocab: int | None = None) -> Tensor:
        """Logits [C, V] of the first `vocab` ids, in the dtype of the product."""
        weight_VD, bias_V = self.weight_VD, self.bias_V
        if vocab is not None and vocab < self.width:  # a slice costs a copy of the whole gradient in every chunk
            weight_VD, bias_V = weight_VD[:vocab], None if bias_V is None else bias_V[:vocab]
        logits_CV = functional.linear(hidden_CD, weight_VD, bias_V)
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.soft_cap is not None:
            logits_CV = torch.tanh(logits_CV / self.soft_cap) * self.soft_cap
        return logits_CV


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

    def context(self, rows: slice, logits_CV: Tensor, signals: Mapping[str, TeacherSignal], vocab: int) -> Context:
        """The context of one chunk."""
        cut: Callable[[Tensor | None], Tensor | None] = lambda values: None if values is None else values[rows]  # noqa: E731
        return Context(
            student_logits_NV=logits_CV,
            tokens_N=self.tokens_N[rows],
            signals={name: signal.rows(rows, vocab) for name, signal in signals.items()},
            stored={name: values[rows] for name, values in self.stored.items()},
            engine_logp_N=cut(self.engine_logp_N),
            rollout_N=cut(self.rollout_N),
            turn_N=cut(self.turn_N),
            position_N=cut(self.position_N),
            step=self.step,
            total_steps=self.total_steps,
        )


def per_token(
    values: Callable[[Context], dict[str, Tensor]],
    steps: Steps,
    signals: Mapping[str, TeacherSignal],
    *,
    hidden_ND: Tensor,
    head: Head | None,
    vocab: int,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Evaluates `values` on every step without ever holding all logits.

    Args:
        values: Function of a chunk's context to named numbers per step, [C] each.
        steps: What else is known about the steps.
        signals: The teachers' answers, by view; each must be about exactly these tokens.
        hidden_ND: The student's hidden states; with `head=None` they are taken to be the logits [N, V] themselves.
        head: The student's head.
        vocab: Ids that student and teachers share; all others get no probability.
        temperature: Student logits are divided by it.
        chunk: Steps per chunk; None picks about 64 MiB of logits. If all steps fit in one chunk nothing is recomputed.

    Returns:
        Named values [N], differentiable in the hidden states and the head.

    Raises:
        SignalError: A signal is misaligned, not finite or poorer than what is asked of it.
    """
    for signal in signals.values():
        signal.check_tokens(steps.tokens_N)
    total = len(steps.tokens_N)
    chunk = chunk or max(1, CHUNK_ELEMENTS // vocab)

    def run(rows: slice, hidden_CD: Tensor) -> dict[str, Tensor]:
        logits_CV = hidden_CD[:, :vocab] if head is None else head.logits(hidden_CD, vocab)
        if temperature != 1.0:
            logits_CV = as_compute(logits_CV) / temperature  # not in bf16: the teacher's are divided in fp32, too
        return values(steps.context(rows, logits_CV, signals, vocab))

    cuts = [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)] or [slice(0, 0)]
    if len(cuts) == 1 or not torch.is_grad_enabled():
        chunks = [run(rows, hidden_ND[rows]) for rows in cuts]
    else:
        chunks = [
            checkpoint(run, rows, hidden_ND[rows], use_reentrant=False, preserve_rng_state=False) for rows in cuts
        ]
    return {name: torch.cat([part[name] for part in chunks]) for name in chunks[0]}
