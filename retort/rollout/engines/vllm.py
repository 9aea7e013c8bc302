"""Generation by vLLM, in a process of its own with a copy of the model's weights. Axis letters: see `retort.core`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.core.rollouts import Status
from retort.errors import SignalError, UnreachableError, UserError
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.follower import Follower
from retort.rollout.engines.saved import save_weights
from retort.rollout.engines.vllm_server import VLLMServer, memory_of

#: Below the first, vLLM takes the likeliest token; between the two it would silently sample at the second.
GREEDY, COLDEST = 1e-5, 0.01
#: Bytes for keys and values: at least, and at most on a CPU, where vLLM would take most of the memory.
_LEAST_BYTES, _MOST_BYTES = 2**27, 2**32


@dataclass(frozen=True)
class VLLMSettings:
    """How vLLM is started.

    Attributes:
        python: The interpreter that has it.
        options: Further arguments of its server, such as `--tensor-parallel-size=2`.
        max_parallel: Completions generated at once.
        longest: Longest sequence, context and completion together, tokens; None for the model's own.
        bound: Nats by which its log-probs of generated tokens may differ from the model's, on average.
        trust_remote_code: Whether code of the model's folder is run.
    """

    python: str
    options: tuple[str, ...] = ()
    max_parallel: int = 256
    longest: int | None = None
    bound: float = 0.1
    trust_remote_code: bool = False


@dataclass(eq=False)
class VLLMEngine(Follower[VLLMSettings]):
    """Has vLLM generate, which reads the model's weights from a folder anew whenever they have changed.

    vLLM has a sampler of its own: of a request's uniforms only the first counts, from which its seed is made. The same
    seed gives the same completion; what is beside it changes no more than rounding. The server starts when weights are
    first needed, and ends with `close`, with the engine, and with the process.

    Attributes: see `Follower`.
    """

    name = "vLLM"
    instead = "rollout.engine=own"

    _server: VLLMServer | None = field(default=None, init=False)

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
        if GREEDY < sampling.temperature < COLDEST:
            raise UserError(
                f"rollout.engine=vllm: temperature {sampling.temperature:g} is one that vLLM does not sample at; use "
                f"{COLDEST:g} or more, or rollout.engine=own"
            )
        rooms = [self._checked(request, sampling) for request in requests]
        if not requests:
            return []
        self.follow()
        return self._asked(requests, rooms, sampling, on_completion)

    @property
    def _cpu(self) -> bool:
        return self.lm.device.type == "cpu"

    def _checked(self, request: Request, sampling: Sampling) -> int:
        """The longest completion of a request, tokens."""
        room, context = min(sampling.max_new_tokens, len(request.uniforms)), request.context
        if context.media:
            raise UserError(
                "a prompt holds an image, a sound or a video, and rollout.engine=vllm hands on text alone; use "
                "rollout.engine=own"
            )
        if not len(context):
            raise UserError("a prompt is empty, and vLLM writes nothing from nothing; use rollout.engine=own")
        highest = int(context.tokens_L.max())
        if highest >= self.rows:
            raise UserError(
                f"a prompt holds {self.tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}), which not all "
                "models of the run have, and vLLM cannot read what it must not write; use rollout.engine=own"
            )
        if len(context) + room > self.longest:
            raise UserError(
                f"a prompt of {len(context)} tokens and a completion of {room} are more than the {self.longest} that "
                "vLLM was started for; lower rollout.max_new_tokens, or use rollout.engine=own"
            )
        return room

    def _completion(self, request: Request, room: int, sampling: Sampling) -> Completion:
        assert self._server is not None
        greedy = sampling.temperature <= GREEDY
        stops = sorted(stop for stop in self.lm.stops.ids if stop < self.rows)
        settings = {
            "max_tokens": room,
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(float(request.uniforms[0]) * 2**53),
            "logprobs": 0,
            "stop_token_ids": stops,
            "ignore_eos": True,
            "detokenize": False,
        }
        asked = {"token_ids": request.context.ids, "sampling_params": settings}
        answer = self._server.post("/inference/v1/generate", asked)
        ids, logps, versions = _read(answer)
        ends = [token in self.lm.stops.ids for token in ids]
        usable = 0 < len(ids) == len(logps) <= room and all(0 <= token < self.rows for token in ids)
        if not usable or any(ends[:-1]) or not (ends[-1] or len(ids) == room) or not all(map(math.isfinite, logps)):
            raise SignalError(f"what vLLM sends is no completion of its prompt; its log: {self._server.log}")
        if versions != {str(self.version)}:
            raise SignalError(f"vLLM wrote with weights {sorted(versions)}, and {self.version} are wanted")
        logp_A = torch.zeros(len(ids)) if greedy else torch.tensor(logps, dtype=torch.float32)
        return Completion(ids, logp_A, Status.COMPLETED if ends[-1] else Status.TRUNCATED, self.version)

    def _written(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return self._asked(requests, [len(own.uniforms) for own in requests], sampling, _nobody)

    def _asked(
        self,
        requests: Sequence[Request],
        rooms: Sequence[int],
        sampling: Sampling,
        on_completion: Callable[[int, Completion], None],
    ) -> list[Completion]:
        assert self._server is not None
        places = list(range(len(requests)))
        return self._server.each(lambda i: self._completion(requests[i], rooms[i], sampling), places, on_completion)

    def _save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_weights(self.lm, weights, folder, self.rows, untied=self._cpu)

    def _begin(self, folder: Path, version: int) -> None:
        assert self._folder is not None
        cpu, parallel = self._cpu, self.settings.max_parallel
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokens = memory_of(config.get("text_config", config)) * self.longest
        keys = max(_LEAST_BYTES, 2 * tokens, min(tokens * parallel, _MOST_BYTES))
        options = [
            *("--skip-tokenizer-init", "--enable-scale-out", "--disable-uvicorn-access-log"),
            *("--served-model-name", "student", "--load-format", "safetensors", "--generation-config", "vllm"),
            *("--dtype", "bfloat16" if self.lm.precision == "bf16" else "float32"),
            *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "1"),
            *("--max-model-len", str(self.longest), "--max-num-seqs", str(parallel)),
            *(("--enforce-eager", "--kv-cache-memory-bytes", str(keys)) if cpu else ()),
            *(("--trust-remote-code",) if self.settings.trust_remote_code else ()),
            *self.settings.options,  # of two with one name the last counts
        ]
        self._server = VLLMServer(self.settings.python, folder, self._folder, options, cpu=cpu, requests=parallel)
        self._say_version(version)

    def _load(self, folder: Path, version: int) -> None:
        assert self._server is not None
        where = {"weights_path": str(folder.resolve())}
        self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": where})
        # What it keeps of prompts was computed with the former weights.
        if not self._server.post("/reset_prefix_cache", {})["success"]:
            raise UnreachableError(f"vLLM does not forget what it keeps of prompts; its log: {self._server.log}")
        self._say_version(version)

    def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None

    def _say_version(self, version: int) -> None:
        """Has every answer say from now on that these weights wrote it."""
        assert self._server is not None
        self._server.post("/update_weight_version", {"new_version": str(version)})


def _nobody(place: int, completion: Completion) -> None:
    """Is told, and does nothing."""


def _read(answer: Any) -> tuple[list[int], list[float], set[str]]:
    """Ids, log-probs and versions of weights in an answer.

    Raises:
        SignalError: It is none.
    """
    try:
        (choice,) = answer["choices"]
        ids = [int(token) for token in choice["token_ids"]]
        told = choice["logprobs"]["content"]
        if [int(own["token_id"]) for own in told] != ids:
            raise ValueError("log-probs of other tokens")
        versions = {str(own["version"]) for own in choice["weight_versions"]}
        return ids, [float(own["logprob"]) for own in told], versions
    except (KeyError, TypeError, ValueError):
        raise SignalError("vLLM sends an answer that is no completion") from None
