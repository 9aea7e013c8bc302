"""A fake that writes what a script says: an engine for tests, which has to pass the contract like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.core.rollouts import Status
from retort.errors import UserError
from retort.rollout.engines.base import Completion, Request, Sampling


class ScriptedEngine:
    """Draws from a given distribution, and ends at its stop token; or writes turns that are given.

    Attributes:
        asked: The requests of every call.
    """

    def __init__(
        self, tokenizer: Any, stop: int, logits_V: Tensor, *, context: int = 128, says: Callable[[Request], Any] = bool
    ) -> None:
        self.tokenizer, self.stop, self.logits_V, self.context, self.says = tokenizer, stop, logits_V, context, says
        self.version, self.image_tokens = 0, None
        self.asked: list[list[Request]] = []

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.asked.append(list(requests))
        return [self._one(request, sampling) for request in requests]

    def logp(self, sampling: Sampling) -> Tensor:
        from retort.rollout.engines.sample import nucleus

        return nucleus((self.logits_V[None] / sampling.temperature).log_softmax(-1), sampling.top_p)[0]

    def _one(self, request: Request, sampling: Sampling) -> Completion:
        if request.context.media:
            raise UserError("a prompt holds an image, a sound or a video, and the script has none")
        if len(request.context) and int(request.context.tokens_L.max()) >= len(self.logits_V):
            raise UserError(f"a prompt holds id {int(request.context.tokens_L.max())}, which has no row")
        logp_V, room = self.logp(sampling), min(sampling.max_new_tokens, len(request.uniforms))
        said = self.says(request)
        ids: list[int] = []
        for step in range(room):
            edges_V = logp_V.double().exp().cumsum(0)
            drawn = int(torch.searchsorted(edges_V, request.uniforms[step] * edges_V[-1], right=True))
            ids.append(said[step] if isinstance(said, list) else drawn)
            if ids[-1] == self.stop:
                break
        status = Status.COMPLETED if ids[-1] == self.stop else Status.TRUNCATED
        return Completion(ids, logp_V[torch.tensor(ids)].float(), status, self.version)
