"""The policy by which a student or a teacher decides at each step. Axis letters: see `retort.core`.

A step decides either a token or the next latent of a denoising process. `retort.core.distribution.Distribution` is the
policy over tokens, `retort.core.gaussian.Gaussian` that over latents. Whatever computes with a policy by these numbers
alone works for both.
"""

from __future__ import annotations

from torch import Tensor

from retort.core.needs import NeedKind
from retort.errors import SignalError


class Policy:
    """What all policies can say about each of C steps, nats, differentiable. The base class can say nothing."""

    #: The kinds of `Need` that the policy meets, of whoever decides by it.
    offers: frozenset[NeedKind] = frozenset()

    def logp_of(self, decided: Tensor) -> Tensor:
        """Log-prob of what was decided, [C], nats: of tokens [C], or of latents [C, D] (a density)."""
        raise self._missing("log-prob of what was decided")

    def entropy(self) -> Tensor:
        """Entropy, [C], nats."""
        raise self._missing("entropy")

    def best_logp(self) -> Tensor | float:
        """The highest log-prob that a policy of this kind can give to a decision, nats: 0, or [C] where it is less.

        Tokens can be certain. Of a latent the noise of the step sets a bound, whatever a model says.
        """
        return 0.0

    def reverse_kl(self, teacher: Policy) -> Tensor:
        """KL(self || teacher), [C], nats."""
        raise self._missing("divergence to another")

    def forward_kl(self, teacher: Policy) -> Tensor:
        """KL(teacher || self), [C], nats."""
        raise self._missing("divergence to another")

    def _missing(self, what: str) -> SignalError:
        return SignalError(f"the policy is not available where this is evaluated, so it has no {what}")
