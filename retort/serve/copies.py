"""Copies of a student, which workers generate with: one that the own loop drives, and one in a vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from retort.errors import SignalError, UnreachableError, UserError
from retort.models.files import read_model
from retort.models.load import load_model
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.vllm_generator import VLLMGenerator, VLLMSettings


class Weights(BaseModel):
    """Weights that a copy is to read, and how it is to generate with them.

    Attributes:
        folder: Of the model.
        version: Optimizer steps that they have taken.
        vocab: Only ids below this are tokens.
        stops: Tokens that end a completion, the primary one first.
        precision: Of the copy.
        attention: Implementation of attention; None: the model's own.
        parallel: Completions generated at once.
        longest: Longest sequence, context and completion together, tokens.
        number: Of the worker, among those of the run.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    folder: str
    version: int = Field(ge=0)
    vocab: int = Field(ge=1)
    stops: list[int] = Field(min_length=1)
    precision: Literal["fp32", "bf16"]
    attention: str | None
    parallel: int = Field(ge=1)
    longest: int = Field(ge=1)
    number: int = Field(ge=0)


class Copy(Protocol):
    """A copy of a student."""

    def read(self, asked: Weights) -> bool:
        """Reads weights; whether they are the first, or the first since the copy was lost.

        Raises:
            UserError: The folder holds no such model.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`.

        Raises:
            UserError: A request cannot be answered.
            UnreachableError: The copy is lost: it has to read weights again.
        """
        ...


class LoopCopy:
    """A copy in this process, which the own loop drives (`HFEngine`)."""

    def __init__(self, device: str, *, trust_remote_code: bool) -> None:
        """Has no weights yet.

        Args:
            device: Where it computes; `auto`: a GPU, if torch sees one.
            trust_remote_code: Whether code of the student's folder is run.
        """
        self._device, self._trusts = _device(device), trust_remote_code
        self._engine: HFEngine | None = None

    def read(self, asked: Weights) -> bool:
        """See `Copy`."""
        if self._engine is None:
            lm = load_model(
                asked.folder,
                role="teacher",
                precision=asked.precision,
                device=self._device,
                attention=asked.attention,
                stop=asked.stops,
                trust_remote_code=self._trusts,
            )
            self._engine = HFEngine(lm, vocab=asked.vocab, max_parallel=asked.parallel)
            self._engine.update(asked.version)
            return True
        own = self._engine.lm.model
        model, _ = read_model(
            asked.folder,
            None,
            "student",
            dtype=own.dtype,
            attention=asked.attention,
            trust_remote_code=self._trusts,
        )
        try:
            own.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise UserError(f"{asked.folder} holds another model: {' '.join(str(error).split())}") from None
        self._engine.update(asked.version)
        return False

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Copy`."""
        assert self._engine is not None
        return self._engine.generate(requests, sampling)


class VLLMCopy:
    """A copy in a vLLM that this process starts, and that ends with it.

    Where vLLM ends or refuses weights, it is started again with those that are read next. Its log is `vllm.log` in a
    folder beside that of the weights, `worker-N`.
    """

    def __init__(
        self, device: str, python: str, options: Sequence[str], *, trust_remote_code: bool, threads: int | None = None
    ) -> None:
        """Starts nothing yet.

        Args:
            device: See `LoopCopy`, as `trust_remote_code`.
            python: The interpreter that has vLLM.
            options: Further arguments of its server.
            trust_remote_code: Whether code of the student's folder is run.
            threads: Of vLLM on a CPU; None: as many as it takes by itself.
        """
        self._device, self._python, self._options = _device(device), python, tuple(options)
        self._trusts, self._threads = trust_remote_code, threads
        self._vllm: VLLMGenerator | None = None

    def read(self, asked: Weights) -> bool:
        """See `Copy`."""
        fresh, folder = self._vllm is None, Path(asked.folder)
        try:
            if self._vllm is None:
                self._vllm = self._started(asked, folder.with_name(f"worker-{asked.number}"))
            self._vllm.read(folder, asked.version)
        except (UserError, UnreachableError, OSError) as error:
            self._lose()
            raise UserError(str(error)) from None
        return fresh

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Copy`."""
        assert self._vllm is not None
        try:
            return self._vllm.generate(requests, sampling)
        except (UnreachableError, SignalError):
            self._lose()
            raise

    def _started(self, asked: Weights, logs: Path) -> VLLMGenerator:
        logs.mkdir(exist_ok=True)
        settings = VLLMSettings(
            self._python, self._options, max_parallel=asked.parallel, trust_remote_code=self._trusts
        )
        return VLLMGenerator(
            settings,
            logs,
            rows=asked.vocab,
            longest=asked.longest,
            stops=frozenset(asked.stops),
            precision=asked.precision,
            cpu=self._device.type == "cpu",
            variables=self._variables(),
        )

    def _variables(self) -> Mapping[str, str]:
        """Of vLLM's process: its threads, and the GPU that it is to take where this process sees several."""
        threads = {"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}
        if self._device.type != "cuda" or self._device.index is None:
            return threads
        seen = [own for own in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if own]
        own = seen[self._device.index] if self._device.index < len(seen) else str(self._device.index)
        return {**threads, "CUDA_VISIBLE_DEVICES": own}

    def _lose(self) -> None:
        if self._vllm is not None:
            self._vllm.close()
        self._vllm = None


def _device(name: str) -> torch.device:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if name == "auto" else name)
