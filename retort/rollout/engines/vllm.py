"""Generation by vLLM, in a process of its own with a copy of the model's weights. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.align.images import ImageTokens
from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UnreachableError, UserError
from retort.files import remove
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.vllm_server import VLLMServer, memory_of
from retort.rollout.engines.vllm_weights import save_weights, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of each completion by which both sides are compared, and prompts that are completed for that.
PROBE_TOKENS, PROBE_PROMPTS = 16, 8
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
class VLLMEngine:
    """Has vLLM generate, which reads the model's weights from a folder anew whenever they have changed.

    vLLM has a sampler of its own: of a request's uniforms only the first counts, from which its seed is made. The same
    seed gives the same completion; what is beside it changes no more than rounding. The server starts when weights are
    first needed, and ends with `close`, with the engine, and with the process.

    Attributes:
        lm: The model whose weights it follows; it stays in this process.
        vocab: Only ids below this are tokens.
        settings: How vLLM is started.
        newest: Returns the version of the model's weights as they are now; they are sent before the next completion.
        probe: Contexts that are completed after weights were sent, to compare both sides.
        version: Version of the weights that vLLM has; -1 before the first.
        noise_floor: Mean size of the difference of both sides' log-probs of the probe's tokens, nats.
    """

    lm: LanguageModel
    vocab: int
    settings: VLLMSettings
    newest: Callable[[], int] = lambda: 0
    probe: Sequence[TokenSequence] = ()
    version: int = -1
    noise_floor: float = math.nan
    _folder: Path | None = None
    _server: VLLMServer | None = None
    _weights: Path | None = field(default=None, init=False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Engine`."""
        return self.lm.tokenizer

    @property
    def context(self) -> int:
        """See `Engine`."""
        return self.lm.context

    @property
    def image_tokens(self) -> ImageTokens | None:
        """See `Engine`; None: images are not handed on."""
        return None

    @property
    def longest(self) -> int:
        """The longest sequence that vLLM was started for, tokens."""
        return min(self.lm.context, self.settings.longest or self.lm.context)

    def open(self, folder: Path) -> None:
        """Has weights and log kept in a folder from now on; without one they are in a temporary folder.

        Args:
            folder: Made when weights are first sent. Of weights that were left in it, nothing is read.
        """
        self._folder = folder

    def close(self) -> None:
        """Ends vLLM and removes the weights that it read; the next completion would start it again."""
        if self._server is not None:
            self._server.close()
        self._server, self.version = None, -1
        if self._weights is not None:
            remove(self._weights)
        self._weights = None

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Sends weights to vLLM, and compares both sides on the probe.

        If vLLM does not take them, or does not compute what the model here does, it gets the former ones back.

        Args:
            version: See `Engine`; with the version that it has, and no weights, nothing is done.
            weights: By the names of the model's folder; None for those of `lm` as they are now.

        Raises:
            UserError: vLLM cannot serve the model, or computes something else than `lm`.
            UnreachableError: It does not take the weights, or has ended.
            RunError: The disk is full.
        """
        if weights is None and version == self.version:
            return
        folder = self._room() / f"weights-{version}"
        if folder == self._weights:
            folder = folder.with_name(f"{folder.name}-anew")
        with self.lm.whole():
            given = weights_of(self.lm) if weights is None else weights
            text = save_weights(self.lm, given, folder, self._rows, untied=self._cpu)
        before, had = self._weights, self.version
        try:
            if self._server is None:
                self._server = self._start(folder, text)
            else:
                self._reload(folder)
            self._say_version(version)
            self.version = version
            self._compare()
        except BaseException as error:
            self._go_back(before, had)
            remove(folder)
            if before is None or not isinstance(error, UserError | UnreachableError):
                raise
            kept = f"keeps those of version {had}" if self._server is not None else "is ended"
            said = f"the student's weights of version {version} are not in vLLM, which {kept}: {error}"
            raise type(error)(said) from None
        self._weights = folder
        if before is not None:
            remove(before)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`.

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
        if self.newest() > self.version:
            self.update(self.newest())
        assert self._server is not None
        places = list(range(len(requests)))
        return self._server.each(lambda i: self._completion(requests[i], rooms[i], sampling), places)

    def metrics(self) -> dict[str, float]:
        """Of a step: the noise floor that was measured when weights were last sent, nats."""
        return {"engine/noise_floor": self.noise_floor} if math.isfinite(self.noise_floor) else {}

    @property
    def _rows(self) -> int:
        """Rows of the embedding that vLLM has."""
        return min(self.vocab, self.lm.rows)

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
        if highest >= self._rows:
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
        stops = sorted(stop for stop in self.lm.stops.ids if stop < self._rows)
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
        usable = 0 < len(ids) == len(logps) <= room and all(0 <= token < self._rows for token in ids)
        if not usable or any(ends[:-1]) or not (ends[-1] or len(ids) == room) or not all(map(math.isfinite, logps)):
            raise SignalError(f"what vLLM sends is no completion of its prompt; its log: {self._server.log}")
        if versions != {str(self.version)}:
            raise SignalError(f"vLLM wrote with weights {sorted(versions)}, and {self.version} are wanted")
        logp_A = torch.zeros(len(ids)) if greedy else torch.tensor(logps, dtype=torch.float32)
        return Completion(ids, logp_A, Status.COMPLETED if ends[-1] else Status.TRUNCATED, self.version)

    def _room(self) -> Path:
        """The folder of weights and log, emptied of what an earlier process left."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="retort-vllm-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        if self._server is None:
            for left in self._folder.glob("weights-*"):
                remove(left)
        return self._folder

    def _start(self, model: Path, text: Mapping[str, Any]) -> VLLMServer:
        assert self._folder is not None
        cpu, parallel = self._cpu, self.settings.max_parallel
        tokens = memory_of(text) * self.longest
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
        return VLLMServer(self.settings.python, model, self._folder, options, cpu=cpu, requests=parallel)

    def _reload(self, folder: Path) -> None:
        assert self._server is not None
        where = {"weights_path": str(folder.resolve())}
        self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": where})
        # What it keeps of prompts was computed with the former weights.
        if not self._server.post("/reset_prefix_cache", {})["success"]:
            raise UnreachableError(f"vLLM does not forget what it keeps of prompts; its log: {self._server.log}")

    def _say_version(self, version: int) -> None:
        """Has every answer say from now on that these weights wrote it."""
        assert self._server is not None
        self._server.post("/update_weight_version", {"new_version": str(version)})

    def _compare(self) -> None:
        """Has vLLM complete the probe, and the model here score what it wrote.

        Raises:
            UserError: Their log-probs differ by more than the bound.
        """
        readable = [own for own in self.probe if int(own.tokens_L.max()) < self._rows]
        contexts = [own for own in readable if len(own) + PROBE_TOKENS <= self.longest][:PROBE_PROMPTS]
        uniforms = [torch.full((PROBE_TOKENS,), (n + 0.5) / PROBE_PROMPTS).double() for n in range(len(contexts))]
        asked = [Request(own, numbers) for own, numbers in zip(contexts, uniforms, strict=True)]
        if not asked:
            return
        assert self._server is not None
        found = self._server.each(lambda own: self._completion(own, PROBE_TOKENS, Sampling(PROBE_TOKENS)), asked)
        written = [own.context.read().then(one.ids, decided=True) for own, one in zip(asked, found, strict=True)]
        theirs_N = torch.cat([one.logp_A for one in found])
        self.noise_floor = float((self._scored(written) - theirs_N).abs().double().mean())
        if not self.noise_floor <= self.settings.bound:
            raise UserError(
                f"vLLM computes something else than the student: their log-probs of the same tokens differ by "
                f"{self.noise_floor:.2g} nats on average, and rollout.noise_bound is {self.settings.bound:g}; use "
                "rollout.engine=own for this model, or raise the bound if that is rounding"
            )

    @torch.no_grad()
    def _scored(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The model's own log-probs of the decided tokens, nats, [N]."""
        tokens_N = torch.cat([own.actions_A for own in sequences])
        with self.lm.whole(), self.lm.compute():
            hidden_ND = self.lm.all_hidden(sequences, 4096)
            logits_NV = self.lm.head().logits(hidden_ND)[:, : self._rows].float()
        return logits_NV.log_softmax(-1).cpu().gather(1, tokens_N[:, None].cpu()).squeeze(1)

    def _go_back(self, before: Path | None, had: int) -> None:
        """Restores the weights that vLLM had; without any, or where it does not take them, it is ended."""
        self.version = had
        if self._server is None:
            return
        try:
            if before is not None:
                self._reload(before)
                self._say_version(had)
                return
        except UnreachableError:
            pass
        self._server.close()
        self._server, self.version = None, -1


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
