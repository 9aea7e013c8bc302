"""The inputs of a term or a weight at the steps of one chunk. Axis letters: see `retort.core`."""

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
#: Nats that an infinite log-ratio counts for where a finite number is needed: about the smallest probability in fp32.
RULED_OUT = 100.0


@dataclass(eq=False)
class Context:
    """The student's live policy, the named signals, the table of steps and the clock, for N steps (or one chunk).

    Attributes:
        policy: The policy by which the student decides; `student` is the same where that is a distribution over tokens.
            What asks `policy` and the signals' `policy` alone does not depend on what a step decides.
        signals: Each view's signal at these steps.
        steps: The table of these steps.
        clock: The progress of the run.
        student_hidden_ND: The student's last hidden states, live; only for estimators that read them.
        latents_ND: The next latents that were decided, where steps denoise; None where they decide tokens.
    """

    policy: Policy
    signals: Mapping[str, SignalRows]
    steps: Steps
    clock: Clock = field(default_factory=Clock)
    student_hidden_ND: Tensor | None = None
    latents_ND: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=lambda: {}, repr=False)

    @staticmethod
    def from_logits(
        logits_NV: Tensor,
        tokens_N: Tensor,
        signals: Mapping[str, SignalRows],
        stored: Mapping[str, Tensor] | None = None,
        *,
        clock: Clock | None = None,
    ) -> Context:
        """Builds a context from plain logits [N, V] at the loss temperature, to try a part by itself."""
        steps = Steps.of(tokens_N, stored=stored)
        return Context(Distribution(as_compute(logits_NV)), signals, steps, clock or Clock())

    def signal(self, view: str) -> SignalRows:
        """The signal of one view.

        Raises:
            SignalError: The view gave no signal.
        """
        if view not in self.signals:
            raise SignalError(f"the method reads view '{view}', which gave no signal (given: {sorted(self.signals)})")
        return self.signals[view]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Computes a value that several parts need once for these steps, and returns the stored one afterwards."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def student(self) -> Distribution:
        """The student's live distribution over the shared vocabulary, already at the loss temperature.

        Raises:
            SignalError: The policy decides no tokens but latents, or its logits are not available (hidden states are
                compared outside of the loss core).
        """
        if self.latents_ND is not None:
            raise SignalError("a denoising step decides no token, so the student has no distribution over a vocabulary")
        if not isinstance(self.policy, Distribution):
            raise SignalError("the student's distribution over tokens is not available where this is evaluated")
        return self.policy

    @property
    def whole_student(self) -> Distribution:
        """The same, for numbers that need all ids at once and do not sum over ranks.

        Raises:
            SignalError: As `student`, or this rank holds only some of the ids.
        """
        if self.student.shard is not WHOLE:
            raise SignalError("this method reads the student's whole distribution, which no rank holds")
        return self.student

    @cached_property
    def student_logp_NV(self) -> Tensor:
        """Live log-probs of the whole vocabulary, nats, softmax in fp32 or better.

        Prefer `student`: this costs several times the memory, and a rank that holds only some of the ids cannot give
        it.
        """
        logits_NV = self.whole_student.logits_CV
        # Not log_softmax: over 150,000 ids the sum in its gradient is ten times less exact in fp32.
        return logits_NV - logits_NV.logsumexp(-1, keepdim=True)

    @cached_property
    def student_logp_N(self) -> Tensor:
        """Live log-prob of what was decided, nats: of the sampled token, or of the next latent."""
        return self.policy.logp_of(self.steps.tokens_N if self.latents_ND is None else self.latents_ND)

    @cached_property
    def student_entropy_N(self) -> Tensor:
        """Live entropy, nats, differentiable."""
        return self.policy.entropy()

    def decided_logps(self, view: str, of: str | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs of what was decided, under the teacher and under the student before the first update, nats, [N].

        What was decided is the sampled token. Against a teacher with another tokenizer it is the step's whole unit
        (`Spans`), at every step of it: the smallest piece of text about which both have a number.

        Args:
            view: The view whose units count.
            of: The view whose teacher is read, if it is another one; it has the student's tokenizer or the same units.

        Raises:
            SignalError: The two views have different units.
        """
        rows, other = self.signal(view), self.signal(of or view)
        logp_N = other.sampled_logp_N
        if other is not rows and other.by_unit:
            if not rows.by_unit or not torch.equal(rows.units.unit_C, other.units.unit_C):
                raise SignalError(
                    f"views '{view}' and '{of}' cut completions into different units; nothing compares them"
                )
        elif other is not rows:
            logp_N = rows.over_unit(logp_N)
        return logp_N, rows.over_unit(self.old_logp_N)

    def live_logp_N(self, view: str) -> Tensor:
        """The student's live log-prob of what was decided (`decided_logps`), nats."""
        return self.signal(view).over_unit(self.student_logp_N)

    def gap_N(self, view: str) -> Tensor:
        """Log p_T - log p_old of the sampled token, nats, finite: an infinite one counts as `RULED_OUT` nats.

        That of a unit of several tokens is divided evenly among them, so that means over steps count it once.

        It serves numbers made of the gaps of a whole rollout or batch, which one token must not turn into NaN. Where
        the log-ratio itself is the advantage, it stays infinite, and so does the loss: the run stops and names the
        token.
        """
        teacher_N, old_N = self.decided_logps(view)
        gap_N = (teacher_N - old_N).nan_to_num(nan=math.nan, posinf=RULED_OUT, neginf=-RULED_OUT)
        return self.signal(view).per_step(gap_N)

    def finite_logp_N(self, view: str) -> Tensor:
        """Log p_T of what was decided, nats; where the teacher rules it out, `RULED_OUT` below the student's."""
        logp_N = self.signal(view).sampled_logp_N
        return torch.where(logp_N == -math.inf, self.live_logp_N(view).detach() - RULED_OUT, logp_N)

    @property
    def old_logp_N(self) -> Tensor:
        """The student's log-prob of the sampled token before the first update on this batch, nats, detached.

        On a strictly on-policy batch nothing is stored, and it is the live value without its gradient.
        """
        old = self.steps.stored.get("old_logp")
        return self.student_logp_N.detach() if old is None else old
