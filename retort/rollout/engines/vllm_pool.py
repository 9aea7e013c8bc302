"""Generation by several vLLMs, each in a worker's process. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.pool import WorkerPool
from retort.rollout.engines.saved import save_weights
from retort.rollout.engines.vllm_generator import check_request, check_sampling, room_of


@dataclass(eq=False)
class VLLMPool(WorkerPool):
    """Has workers generate whose copy of the model is in a vLLM of their own (`retort.serve.copies.VLLMCopy`).

    Which completion a request gets depends on its first uniform, not on the worker; see `VLLMGenerator`. One whose vLLM
    ends has it started again, and is asked the same again.

    Attributes: see `Follower`.
    """

    name = "the pool of workers with vLLM"
    instead = "rollout.engine=own"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `WorkerPool`.

        Raises:
            UserError: Also where vLLM cannot sample like that, or a sequence would be longer than it was started for.
            SignalError: What a worker sends are no completions of these requests.
            UnreachableError: One ended several times without an answer.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        check_sampling(sampling)
        for own in requests:
            room = room_of(own, sampling)
            check_request(own, room, rows=self.rows, longest=self.longest, tokenizer=self.tokenizer)
        return super().generate(requests, sampling)

    def _save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_weights(self.lm, weights, folder, self.rows, untied=self.lm.device.type == "cpu")
