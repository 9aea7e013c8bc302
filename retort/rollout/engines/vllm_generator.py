"""vLLM over a copy of a model's weights, wherever the model itself is. Axis letters: see `retort.core`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retort.core.rollouts import Status
from retort.errors import SignalError, UnreachableError, UserError
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.vllm_server import VLLMServer, memory_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def has_vllm() -> bool:
    """Whether this interpreter has vLLM, so that no other has to be named."""
    return importlib.util.find_spec("vllm") is not None


@dataclass(eq=False)
class VLLMGenerator:
    """A server of vLLM, and the weights that it last read. It starts when it first reads some.

    vLLM has a sampler of its own: of a request's uniforms only the first counts, from which its seed is made. The same
    seed gives the same completion; what is beside it changes no more than rounding. The server ends with `close`, with
    this object, and with the process.

    Attributes:
        settings: How it is started.
        folder: Where its log goes.
        rows: Number of ids that can be generated.
        longest: Longest sequence, context and completion together, tokens.
        stops: Tokens that end a completion.
        precision: Of its weights, `fp32` or `bf16`.
        cpu: Whether it computes on the CPU.
        variables: Further environment variables of it.
        version: Version of the weights that it has read; -1 before the first.
    """

    settings: VLLMSettings
    folder: Path
    rows: int
    longest: int
    stops: frozenset[int]
    precision: str
    cpu: bool
    variables: Mapping[str, str] = field(default_factory=lambda: {})
    version: int = -1
    _server: VLLMServer | None = field(default=None, init=False)

    @property
    def pid(self) -> int | None:
        """The process that leads the server's group; None where there is none."""
        return None if self._server is None else self._server.pid

    def read(self, folder: Path, version: int) -> None:
        """Has vLLM read weights from a folder and say their version with every completion from then on.

        Args:
            folder: A model's, see `retort.rollout.engines.saved.save_weights`.
            version: Optimizer steps that they have taken.

        Raises:
            UserError: It does not start with this model.
            UnreachableError: It does not take the weights, or has ended.
        """
        if self._server is None:
            self._begin(folder)
        else:
            where = {"weights_path": str(folder.resolve())}
            self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": where})
            # What it keeps of prompts was computed with the former weights.
            if not self._server.post("/reset_prefix_cache", {})["success"]:
                raise UnreachableError(f"vLLM does not forget what it keeps of prompts; its log: {self._server.log}")
        assert self._server is not None
        self._server.post("/update_weight_version", {"new_version": str(version)})
        self.version = version

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_completion: Callable[[int, Completion], None] = lambda place, completion: None,
    ) -> list[Completion]:
        """Completions of requests that `checked` lets through, in order.

        Args:
            requests: The requests.
            sampling: Settings of sampling.
            on_completion: See `EarlyEngine.generate_each`.

        Raises:
            SignalError: What vLLM sends are no completions of these requests.
            UnreachableError: It has ended.
        """
        assert self._server is not None
        return self._server.each(lambda own: self._completion(own, sampling), requests, on_completion)

    def close(self) -> None:
        """Ends the server; weights that are read later start another."""
        if self._server is not None:
            self._server.close()
        self._server, self.version = None, -1

    def _begin(self, folder: Path) -> None:
        parallel = self.settings.max_parallel
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokens = memory_of(config.get("text_config", config)) * self.longest
        keys = max(_LEAST_BYTES, 2 * tokens, min(tokens * parallel, _MOST_BYTES))
        options = [
            *("--skip-tokenizer-init", "--enable-scale-out", "--disable-uvicorn-access-log"),
            *("--served-model-name", "student", "--load-format", "safetensors", "--generation-config", "vllm"),
            *("--dtype", "bfloat16" if self.precision == "bf16" else "float32"),
            *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "1"),
            *("--max-model-len", str(self.longest), "--max-num-seqs", str(parallel)),
            *(("--enforce-eager", "--kv-cache-memory-bytes", str(keys)) if self.cpu else ()),
            *(("--trust-remote-code",) if self.settings.trust_remote_code else ()),
            *self.settings.options,  # of two with one name the last counts
        ]
        self._server = VLLMServer(
            self.settings.python,
            folder,
            self.folder,
            options,
            cpu=self.cpu,
            requests=parallel,
            variables=self.variables,
        )

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        assert self._server is not None
        greedy = sampling.temperature <= GREEDY
        room = room_of(request, sampling)
        settings = {
            "max_tokens": room,
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(float(request.uniforms[0]) * 2**53),
            "logprobs": 0,
            "stop_token_ids": sorted(stop for stop in self.stops if stop < self.rows),
            "ignore_eos": True,
            "detokenize": False,
        }
        asked = {"token_ids": request.context.ids, "sampling_params": settings}
        answer = self._server.post("/inference/v1/generate", asked)
        ids, logps, versions = _read(answer)
        ends = [token in self.stops for token in ids]
        usable = 0 < len(ids) == len(logps) <= room and all(0 <= token < self.rows for token in ids)
        if not usable or any(ends[:-1]) or not (ends[-1] or len(ids) == room) or not all(map(math.isfinite, logps)):
            raise SignalError(f"what vLLM sends is no completion of its prompt; its log: {self._server.log}")
        if versions != {str(self.version)}:
            raise SignalError(f"vLLM wrote with weights {sorted(versions)}, and {self.version} are wanted")
        logp_A = torch.zeros(len(ids)) if greedy else torch.tensor(logps, dtype=torch.float32)
        return Completion(ids, logp_A, Status.COMPLETED if ends[-1] else Status.TRUNCATED, self.version)


def room_of(request: Request, sampling: Sampling) -> int:
    """The longest completion of a request, tokens."""
    return min(sampling.max_new_tokens, len(request.uniforms))


def check_sampling(sampling: Sampling) -> None:
    """Refuses temperatures at which vLLM does not sample.

    Raises:
        UserError: That.
    """
    if GREEDY < sampling.temperature < COLDEST:
        raise UserError(
            f"rollout.engine=vllm: temperature {sampling.temperature:g} is one that vLLM does not sample at; use "
            f"{COLDEST:g} or more, or rollout.engine=own"
        )


def check_request(request: Request, room: int, *, rows: int, longest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a request that vLLM cannot answer.

    Args:
        request: What would be asked of it.
        room: The longest completion, tokens.
        rows: Number of ids that it has.
        longest: Longest sequence that it takes, tokens.
        tokenizer: Of the model, for the message.

    Raises:
        UserError: Why it cannot.
    """
    context = request.context
    if context.media:
        raise UserError(
            "a prompt holds an image, a sound or a video, and rollout.engine=vllm hands on text alone; use "
            "rollout.engine=own"
        )
    if not len(context):
        raise UserError("a prompt is empty, and vLLM writes nothing from nothing; use rollout.engine=own")
    highest = int(context.tokens_L.max())
    if highest >= rows:
        raise UserError(
            f"a prompt holds {tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}), which not all "
            "models of the run have, and vLLM cannot read what it must not write; use rollout.engine=own"
        )
    if len(context) + room > longest:
        raise UserError(
            f"a prompt of {len(context)} tokens and a completion of {room} are more than the {longest} that "
            "vLLM was started for; lower rollout.max_new_tokens, or use rollout.engine=own"
        )


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
