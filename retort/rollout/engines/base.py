"""What an engine is: whoever writes completions. Axis letters: see `retort.core`.

`tests/contracts/test_engine.py` is what each has to pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: Longest completion.
        temperature: Logits are divided by it.
        top_p: Nucleus; 1 is the model's own distribution.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to write.

    Attributes:
        context: What it follows, tokens and media; which of them were decided does not matter.
        uniforms: Random numbers in [0, 1), one per token that may be written, float64: the only source of chance. A
            completion is never longer than there are numbers.
    """

    context: TokenSequence
    uniforms: Tensor


@dataclass(frozen=True, eq=False)
class Completion:
    """What was written.

    Attributes:
        ids: Tokens, the stop token included; at least one.
        logp_A: Log-prob of each under the distribution it was drawn from, nats, fp32, on the CPU.
        status: Completed, or truncated at the limit; then it holds no stop token.
        version: Of the weights that wrote it, as the engine was last told.
    """

    ids: list[int]
    logp_A: Tensor
    status: Status
    version: int = 0


class Engine(Protocol):
    """Whoever writes."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model that writes."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence, context and completion together, tokens."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Writes a completion to every request, in order; each depends on its own request and the weights alone.

        Raises:
            UserError: A context holds what the model cannot read: an id without a row, or media.
        """
        ...

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Says which weights write from now on.

        Args:
            version: Optimizer steps they have taken.
            weights: They, by name, for an engine that holds a copy; None for one that writes with the live ones.
        """
        ...
