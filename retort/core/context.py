"""All that a term or a weight may look at for the steps of one chunk. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from retort.core.distribution import WHOLE, Distribution
from retort.core.policy import Policy
from retort.core.signals import SignalRows, as_compute
from retort.core.steps import Clock, Steps
from retort.errors import SignalError

T = TypeVar("T")
#: Nats that count for a log-ratio that is infinite, where it must be a number: about what fp32 tells from 0.
RULED_OUT = 100.0


@dataclass(eq=False)
class Context:
    """The student's live policy, the named signals, the table of steps and the clock, for N steps (or one chunk).

    Attributes:
        policy: What the student decides by; `student` is the same where that is a distribution over tokens.
        signals: Each view's answer for these steps.
        steps: What else is known about them.
        clock: Where the run is.
        student_hidden_ND: The student's last hidden states, live; only for estimators that read them.
    """

    policy: Policy
    signals: Mapping[str, SignalRows]
    steps: Steps
    clock: Clock = field(default_factory=Clock)
    student_hidden_ND: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=lambda: {}, repr=False)

    @staticmethod
    def of(
        logits_NV: Tensor,
        tokens_N: Tensor,
        signals: Mapping[str, SignalRows],
        stored: Mapping[str, Tensor] | None = None,
        *,
        clock: Clock | None = None,
    ) -> Context:
        """From plain logits [N, V] at the loss temperature: how a part is tried by itself."""
        steps = Steps.of(tokens_N, stored=stored)
        return Context(Distribution(as_compute(logits_NV)), signals, steps, clock or Clock())

    def signal(self, view: str) -> SignalRows:
        """The answer of one view."""
        if view not in self.signals:
            raise SignalError(f"the method asks view '{view}', which gave no signal (given: {sorted(self.signals)})")
        return self.signals[view]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What several parts need and nobody should compute twice for these steps."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def student(self) -> Distribution:
        """The student's live distribution over the shared vocabulary, already at the loss temperature.

        Raises:
            SignalError: It decides no tokens, or its logits are not at hand (hidden states are compared outside of the
                loss core).
        """
        if not isinstance(self.policy, Distribution):
            raise SignalError("the student's distribution over tokens is not at hand where this is evaluated")
        return self.policy

    @cached_property
    def student_logp_NV(self) -> Tensor:
        """Live log-probs of the whole vocabulary, nats, softmax in fp32 or better.

        For what `student` does not offer: it costs several times the memory, and a rank that holds only some of the
        ids has no such thing.
        """
        if self.student.shard is not WHOLE:
            raise SignalError("this method reads the student's whole distribution, which no rank holds")
        logits_NV = self.student.logits_CV
        # Not log_softmax: over 150,000 ids the sum in its gradient is ten times less exact in fp32.
        return logits_NV - logits_NV.logsumexp(-1, keepdim=True)

    @cached_property
    def student_logp_N(self) -> Tensor:
        """Live log-prob of the written token, nats."""
        return self.student.logp_at(self.steps.tokens_N[:, None]).squeeze(-1)

    @cached_property
    def student_entropy_N(self) -> Tensor:
        """Live entropy, nats, differentiable."""
        return self.student.entropy()

    def gap_N(self, view: str) -> Tensor:
        """Log p_T - log p_old of the written token, nats, finite: an infinite one counts as `RULED_OUT` nats.

        For whatever is made of the gaps of a whole rollout or batch, which one token must not make NaN. Where the
        log-ratio itself is the advantage it stays infinite, and so does the loss: a run stops there, by name.
        """
        gap_N = self.signal(view).sampled_logp_N - self.old_logp_N
        return gap_N.nan_to_num(nan=math.nan, posinf=RULED_OUT, neginf=-RULED_OUT)

    def finite_logp_N(self, view: str) -> Tensor:
        """Log p_T of the written token, nats; where the teacher rules it out, `RULED_OUT` below the student's."""
        logp_N = self.signal(view).sampled_logp_N
        return torch.where(logp_N == -math.inf, self.student_logp_N.detach() - RULED_OUT, logp_N)

    @property
    def old_logp_N(self) -> Tensor:
        """The student's log-prob of the written token before the first update on this batch, nats, detached.

        Strictly on-policy (nothing stored), it is the live value without its gradient.
        """
        old = self.steps.stored.get("old_logp")
        return self.student_logp_N.detach() if old is None else old
