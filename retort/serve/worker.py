"""A process that generates for a run, over a copy of its student: `python -m retort.serve.worker --port PORT`.

Weights come as a folder that both see, completions go back over HTTP. Every request but `/health` brings the key that
the environment holds. Axis letters: see `retort.core`; S is sequences, T all their tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from retort.errors import RetortError, SignalError, UnreachableError, UserError
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.vllm_server import vllm_of
from retort.serve.command import listen
from retort.serve.copies import Copy, LoopCopy, VLLMCopy, Weights
from retort.serve.http import Bodies, OtherWeightsError, Turns, Work, answered, guarded, posted, validated
from retort.wire.protocol import HEALTH, TENSORS, unpacked
from retort.wire.workers import GENERATE, KEY, LOAD

#: Most bytes of a request, and requests that may wait: a rank has one under way for each of its workers.
_MOST_BYTES, _MOST_WAITING = 2**29, 4096


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Generate(_Strict):
    version: int
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)


class Worker:
    """What a copy of a student answers to requests. One request is computed at a time."""

    def __init__(self, copy: Copy) -> None:
        """Has no weights yet.

        Args:
            copy: Of the student.
        """
        self._copy, self._has = copy, ("", -1)

    def load(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Reads the weights in a folder; `fresh` says whether they are the first.

        Raises:
            UserError: The request is none, or the folder no such model.
        """
        asked, fresh = validated(Weights, settings), False
        now = (asked.folder, asked.version)
        if now != self._has:
            self._has = ("", -1)
            fresh = self._copy.read(asked)
            self._has = now
        return {"fresh": torch.tensor([int(fresh)])}

    def generate(self, tensors: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
        """Completions of contexts, drawn with the random numbers that come along: `ids_T`, `logp_T`, `lengths_S`.

        Raises:
            UserError: The request is none.
            OtherWeightsError: It is about other weights than these.
        """
        asked = validated(_Generate, settings)
        if asked.version != self._has[1]:
            raise OtherWeightsError(f"weights of version {asked.version} are wanted, and there are {self._has[1]}")
        try:
            contexts = unpacked(tensors, lambda digests: [])
        except ValueError as error:
            raise UserError(str(error)) from None
        rooms_S, uniforms_U = tensors.get("rooms_S"), tensors.get("uniforms_U")
        if rooms_S is None or uniforms_U is None or uniforms_U.dtype != torch.float64 or uniforms_U.ndim != 1:
            raise UserError("rooms_S and uniforms_U (float64) are needed")
        rooms: list[int] = rooms_S.flatten().tolist()
        if len(rooms) != len(contexts) or min(rooms, default=1) < 1 or sum(rooms) != len(uniforms_U):
            raise UserError("rooms_S and uniforms_U disagree")
        if not bool(((uniforms_U >= 0) & (uniforms_U < 1)).all()):
            raise UserError("a random number is out of its range")
        requests = [Request(own, part) for own, part in zip(contexts, uniforms_U.split(rooms), strict=True)]
        found = self._written(requests, Sampling(asked.max_new_tokens, asked.temperature, asked.top_p))
        return {
            "ids_T": torch.tensor([token for own in found for token in own.ids]),
            "logp_T": torch.cat([own.logp_A for own in found]),
            "lengths_S": torch.tensor([len(own.ids) for own in found]),
        }

    def _written(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        try:
            return self._copy.generate(requests, sampling)
        except (UnreachableError, SignalError) as error:  # whoever asks sends the weights again, and asks again
            self._has = ("", -1)
            raise OtherWeightsError(str(error)) from None


def application(worker: Worker, *, key: str) -> Any:
    """The application of a worker, for `uvicorn`.

    Args:
        worker: The copy of the student.
        key: Bearer token that every request but `/health` must bring.

    Raises:
        UserError: There is no key, or the extra `serve` is not installed.
    """
    if not key:
        raise UserError(f"a worker needs a key in the environment variable {KEY}")
    try:
        from fastapi import FastAPI, Request, Response
    except ImportError as error:
        raise UserError(f"a worker needs the package '{error.name}': pip install 'retort-distill[serve]'") from None
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guarded(app, key)
    compute, read = Turns(_MOST_WAITING), Bodies()

    def route(path: str, work: Work) -> None:
        async def answer(request: Request) -> Response:
            told = f"a request has at most {_MOST_BYTES:,} bytes"
            return await posted(
                request, lambda body: compute(lambda: answered(body, work), TENSORS), read, _MOST_BYTES, told
            )

        answer.__annotations__ = {"request": Request, "return": Response}  # those here are names of this function
        app.post(path)(answer)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": compute.waiting}

    health.__annotations__ = {}
    app.get(HEALTH)(health)
    route(LOAD, worker.load)
    route(GENERATE, worker.generate)
    return app


def work(
    *,
    host: str,
    port: int,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    vllm: Sequence[str] = (),
    listening: Callable[[int], Any] = lambda port: None,
) -> None:
    """Generates for a run until the process is ended.

    Args:
        host: Address to listen at.
        port: Port to listen at; 0: any that is free.
        device: See `LoopCopy`, as `trust_remote_code`.
        threads: Of torch, or of vLLM; None: as many as it takes by itself.
        trust_remote_code: See `LoopCopy`.
        vllm: The interpreter of a vLLM that generates, and further arguments of its server; none: the own loop does.
        listening: Takes the port, once requests are answered.

    Raises:
        UserError: There is no key in the environment, the extra `serve` is not installed, or there is no such vLLM.
    """
    if threads:
        torch.set_num_threads(threads)
    copy: Copy
    if vllm:
        python, *options = vllm
        vllm_of(python)
        copy = VLLMCopy(device, python, options, trust_remote_code=trust_remote_code, threads=threads)
    else:
        copy = LoopCopy(device, trust_remote_code=trust_remote_code)
    app = application(Worker(copy), key=os.environ.get(KEY, "").strip())
    listen(app, "a copy of the student", host=host, port=port, say=lambda text: None, listening=listening)


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m retort.serve.worker")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--vllm", action="append", default=[], help="its interpreter, then each argument of its server")
    asked = parser.parse_args(words)
    try:
        work(
            host="127.0.0.1",
            port=asked.port,
            device=asked.device,
            threads=asked.threads,
            trust_remote_code=asked.trust_remote_code,
            vllm=asked.vllm,
        )
    except RetortError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
