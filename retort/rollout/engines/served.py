"""Generation with a model that a server holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from retort.errors import SignalError
from retort.models.served import ServedModel
from retort.rollout.engines.answers import completions
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.of_model import OfModel


class ServedEngine(OfModel[ServedModel]):
    """Has a server generate: it gets the random numbers, so completions are those of `HFEngine` in its process."""

    def __init__(self, lm: ServedModel, *, vocab: int, max_parallel: int) -> None:
        """Builds the engine; see `HFEngine`."""
        self.lm, self.vocab, self.max_parallel = lm, vocab, max_parallel
        self.version = 0

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """See `Engine`; a served model keeps its weights, and only the version is stored."""
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`.

        Raises:
            SignalError: The server sends no completions of these requests.
            UnreachableError: It gave no usable answer within the patience of its client.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), i))
        batches = [order[start : start + self.max_parallel] for start in range(0, len(order), self.max_parallel)]
        found = self.lm.server.client.each(lambda batch: self._batch([requests[i] for i in batch], sampling), batches)
        completions: dict[int, Completion] = {}
        for batch, own in zip(batches, found, strict=True):
            completions.update(zip(batch, own, strict=True))
        return [completions[index] for index in range(len(requests))]

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        uniforms = [request.uniforms[: sampling.max_new_tokens] for request in requests]
        settings = {
            "vocab": self.vocab,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        found = self.lm.completions([request.context for request in requests], uniforms, settings)
        stops, rooms = self.lm.stops, [len(own_A) for own_A in uniforms]
        try:
            return completions(found, rooms, vocab=self.vocab, stops=stops, version=self.version)
        except ValueError:
            raise SignalError(f"{self.lm.name}: what it sends are no completions of these prompts") from None
