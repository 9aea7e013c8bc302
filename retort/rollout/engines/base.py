"""The protocol of engines, which generate completions. Axis letters: see `retort.core`.

Every engine has to pass `tests/contracts/test_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
        context: Tokens and media that it follows; which of them were decided does not matter. A completion goes on
            where it was interrupted if they end with its first tokens, and `uniforms` are those of the others.
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


@runtime_checkable
class EarlyEngine(Protocol):
    """What an engine has besides that can tell a completion while it generates others."""

    def generate_each(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: Callable[[int, Completion], None]
    ) -> list[Completion]:
        """See `Engine.generate`, which gives the same completions.

        Args:
            requests: As there.
            sampling: As there.
            on_completion: Takes the place of a request and its completion as soon as that is there, once for each, in
                any order; it is called in the thread of the caller.
        """
        ...


def generated(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, on_completion: Callable[[int, Completion], None]
) -> list[Completion]:
    """Completions of all requests; an engine that reports none early reports all of them at the end.

    Args:
        engine: The engine.
        requests: See `Engine.generate`.
        sampling: See `Engine.generate`.
        on_completion: See `EarlyEngine.generate_each`.
    """
    if isinstance(engine, EarlyEngine):
        return engine.generate_each(requests, sampling, on_completion)
    found = engine.generate(requests, sampling)
    for place, own in enumerate(found):
        on_completion(place, own)
    return found


class FollowingEngine(Engine, Protocol):
    """An engine with a copy of a model's weights, which follow the model's whenever they are sent.

    It may generate in one thread while the model learns in another: `keep` is called where the model is at rest, and
    `update` with that version by whoever generates, before the first completion that is to have these weights. On
    several ranks all of them call `keep`, `update` and `close` together, while each generates its own part.
    """

    @property
    def name(self) -> str:
        """What it is called in messages: `vLLM`."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights that it has; -1 before the first."""
        ...

    @property
    def noise_floor(self) -> float:
        """Mean size of the difference of its log-probs from the model's when both last had one version, nats."""
        ...

    def open(self, folder: Path) -> None:
        """Has weights and logs kept in a folder from now on; of what was left in it, nothing is read."""
        ...

    def keep(self, version: int) -> None:
        """Keeps the model's weights as they are now until `update(version)`; those of older versions are let go then.

        Args:
            version: Optimizer steps that they have taken.

        Raises:
            RunError: The disk is full.
        """
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Within, it generates with the newest weights, unless `keep` was called; all ranks enter it together."""
        ...

    def close(self) -> None:
        """Ends what it started, and removes the weights that it read."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of a step: what it measured, by the name of a metric."""
        ...
