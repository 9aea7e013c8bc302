"""Generation by vLLM, in a process of its own with a copy of the model's weights. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.follower import Follower
from retort.rollout.engines.saved import save_weights
from retort.rollout.engines.vllm_generator import VLLMGenerator, VLLMSettings, check_request, check_sampling, room_of


@dataclass(eq=False)
class VLLMEngine(Follower[VLLMSettings]):
    """Has vLLM generate, which reads the model's weights from a folder anew whenever they have changed.

    See `VLLMGenerator` for how it draws. The server starts when weights are first needed, and ends with `close`, with
    the engine, and with the process.

    Attributes: see `Follower`.
    """

    name = "vLLM"
    instead = "rollout.engine=own"

    _vllm: VLLMGenerator | None = field(default=None, init=False)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`, and `generate_each`."""
        return self.generate_each(requests, sampling, _nobody)

    def generate_each(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: Callable[[int, Completion], None]
    ) -> list[Completion]:
        """See `EarlyEngine`.

        Raises:
            UserError: Also where vLLM cannot sample like that, or a sequence would be longer than it was started for.
            SignalError: What vLLM sends are no completions of these requests.
            UnreachableError: It has ended.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        check_sampling(sampling)
        for own in requests:
            room = room_of(own, sampling)
            check_request(own, room, rows=self.rows, longest=self.longest, tokenizer=self.tokenizer)
        if not requests:
            return []
        self.follow()
        return self._from(requests, sampling, on_completion)

    @property
    def pids(self) -> list[int]:
        """Processes that were started here, each with its group."""
        return [] if self._vllm is None or self._vllm.pid is None else [self._vllm.pid]

    @property
    def _cpu(self) -> bool:
        return self.lm.device.type == "cpu"

    def _written(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return self._from(requests, sampling, _nobody)

    def _from(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: Callable[[int, Completion], None]
    ) -> list[Completion]:
        assert self._vllm is not None
        return self._vllm.generate(requests, sampling, on_completion)

    def _save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_weights(self.lm, weights, folder, self.rows, untied=self._cpu)

    def _begin(self, folder: Path, version: int) -> None:
        assert self._folder is not None
        stops, precision = self.lm.stops.ids, self.lm.precision
        self._vllm = VLLMGenerator(
            self.settings, self._folder, self.rows, self.longest, stops, precision=precision, cpu=self._cpu
        )
        self._vllm.read(folder, version)

    def _load(self, folder: Path, version: int) -> None:
        assert self._vllm is not None
        self._vllm.read(folder, version)

    def _end(self) -> None:
        if self._vllm is not None:
            self._vllm.close()
        self._vllm = None


def _nobody(place: int, completion: Completion) -> None:
    """Does nothing."""
