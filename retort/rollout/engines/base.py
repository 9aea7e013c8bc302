"""The protocol of engines, which generate completions. Axis letters: see `retort.core`.

Every engine has to pass `tests/contracts/test_engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from retort.align.images import ImageTokens
from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        max_new_tokens: Longest completion, tokens.
        temperature: The divisor of the logits.
        top_p: Probability mass of the nucleus; 1 is the model's own distribution.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(eq=False)
class TurnCache:
    """What an engine keeps of one conversation from a turn to the next, so that it need not read all of it again.

    Whoever plays the conversation makes one, hands it over with every request of it, and clears it after the last. An
    engine that keeps nothing leaves it empty; the completions are the same up to rounding.

    Attributes:
        state: The engine's own; None where nothing is kept.
    """

    state: Any = None

    def clear(self) -> None:
        """Frees what is kept."""
        self.state = None


@dataclass(frozen=True, eq=False)
class Request:
    """A request for one completion.

    Attributes:
        context: Tokens and media that it follows; which of them were decided does not matter.
        uniforms: Random numbers in [0, 1), one per token that may be generated, float64: the only source of randomness.
            A completion is never longer than there are numbers. An engine with a sampler of its own (vLLM) makes its
            seed of the first one: the same numbers give the same completion, but not that of another engine.
        turn_cache: What is kept of this conversation, where a request that goes on from this one may follow; None where
            none does. No two requests of one call share it.
    """

    context: TokenSequence
    uniforms: Tensor
    turn_cache: TurnCache | None = None


@dataclass(frozen=True, eq=False)
class Completion:
    """A completion of one request.

    Attributes:
        ids: Ids of the tokens, the stop token included; at least one.
        logp_A: Log-prob of each under the distribution it was sampled from, nats, fp32, on the CPU.
        status: Completed, or truncated at the limit; a truncated one has no stop token.
        version: Version of the weights, as the engine last got it.
    """

    ids: list[int]
    logp_A: Tensor
    status: Status
    version: int = 0


class Engine(Protocol):
    """An engine, which generates completions."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence, context and completion together, tokens."""
        ...

    @property
    def image_tokens(self) -> ImageTokens | None:
        """How images are written into the model's prompts; None for a model of text alone."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Generates a completion for every request, in order; each depends on its own request and the weights alone.

        Raises:
            UserError: A context holds tokens that the model cannot read: an id without a row, or media.
        """
        ...

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Sets the weights for the following completions.

        Args:
            version: Optimizer steps that the weights have taken.
            weights: The weights by name, for an engine with a copy; None for one that uses the live ones.
        """
        ...
