"""The HTTP of `retort serve`. `fastapi` is part of the extra `serve`, and imported when a server is made."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import OutOfMemoryError, Tensor

import retort
from retort.errors import RetortError, UserError, shortened, visible
from retort.serve.images import LackingError
from retort.serve.scorer import OtherWeightsError, Scorer, TooLargeError
from retort.wire.media import MOST_SENT
from retort.wire.protocol import ABOUT, FILES, GENERATE, HEAD, HEALTH, HIDDEN, IMAGES, LACKING, SCORE, TENSORS

#: Seconds after which a client whose request found no room may come back.
_LATER = "1"
#: Bytes of a request for each token: its id, whether it was decided, what else may be said of it.
_TOKEN_BYTES = 64
#: Bytes of a request besides its tokens or images.
_ENVELOPE = 2**20
#: Bytes of all requests that are read, wait or are computed: 1 GiB. Further ones are told to come back.
_MOST_READ = 2**30
#: Makes an answer of a request's tensors and settings.
Work = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
#: Answer of a server whose weights are others than a request is about.
_CONFLICT = 409


def application(scorer: Scorer, *, key: str = "", most_waiting: int = 64) -> Any:
    """The application of a server, for `uvicorn`.

    Args:
        scorer: The model and what it answers.
        key: Bearer token that every request but `/health` must bring; empty: none.
        most_waiting: Most requests that wait for their turn; others are answered 429.

    Raises:
        UserError: The extra `serve` is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
    except ImportError as error:
        raise UserError(f"retort serve needs the package '{error.name}': pip install 'retort-distill[serve]'") from None

    app = FastAPI(title="retort serve", version=retort.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    compute, read = _Turns(most_waiting), _Read()

    @app.middleware("http")
    async def keyed(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "")
        allowed = not key or hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode())
        if not allowed and request.url.path != HEALTH:
            return _refusal(401, "a key is needed")
        return await go_on(request)

    def route(path: str, work: Work, most: int, told: str) -> None:
        async def answer(request: Request) -> Response:
            return await _posted(
                request, lambda body: compute(lambda: _answered(body, work), TENSORS), read, most, told
            )

        answer.__annotations__ = {"request": Request, "return": Response}  # those here are names of this function
        app.post(path)(answer)

    def page(path: str, work: Callable[[], bytes], kind: str) -> None:
        async def answer() -> Response:
            return await compute(work, kind)

        answer.__annotations__ = {"return": Response}
        app.get(path)(answer)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": retort.__version__, "waiting": compute.waiting}

    health.__annotations__ = {}
    app.get(HEALTH)(health)
    page(ABOUT, lambda: scorer.about.model_dump_json().encode(), "application/json")
    page(FILES, lambda: json.dumps(scorer.files).encode(), "application/json")
    page(HEAD, lambda: _safetensors(scorer.head()), TENSORS)
    tokens = (scorer.most_tokens * _TOKEN_BYTES + _ENVELOPE, f"a request has at most {scorer.most_tokens} tokens")
    route(HIDDEN, scorer.hidden, *tokens)
    route(SCORE, scorer.score, *tokens)
    route(GENERATE, scorer.generate, *tokens)
    route(IMAGES, scorer.hold, MOST_SENT + _ENVELOPE, f"a request sends at most {MOST_SENT:,} bytes of images")
    return app


@dataclass
class _Read:
    """The bytes of all bodies in memory."""

    filled: int = 0


async def _posted(request: Any, answer: Callable[[bytes], Awaitable[Any]], read: _Read, most: int, told: str) -> Any:
    """The answer to a request with a body, or the refusal of one that is too long or of another type."""
    if request.headers.get("Content-Type") != TENSORS:  # no page of a browser can send that by itself
        return _refusal(415, f"the body is {TENSORS}: a safetensors file")
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            read.filled += len(part)
            if len(found) > most:
                return _refusal(413, told)
            if read.filled > _MOST_READ:
                return _refusal(429, "other requests take all memory for them", **{"Retry-After": _LATER})
        return await answer(bytes(found))
    finally:
        read.filled -= len(found)


class _Turns:
    """Computes one request at a time, in a thread of its own, while the event loop goes on.

    Attributes:
        waiting: Number of requests that are computed or wait for it.
    """

    def __init__(self, most: int) -> None:
        self.waiting, self._most = 0, most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    async def __call__(self, work: Callable[[], bytes], kind: str) -> Any:
        """The answer that some work gives, of a type; or the refusal of what it raises."""
        from fastapi import Response

        if self.waiting >= self._most:
            return _refusal(429, f"{self.waiting} requests are waiting", **{"Retry-After": _LATER})
        self.waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OtherWeightsError as error:
            return _refusal(_CONFLICT, str(error))
        except LackingError as error:
            return _refusal(LACKING, str(error))
        except TooLargeError as error:
            return _refusal(413, str(error))
        except UserError as error:
            return _refusal(400, str(error))
        except RetortError as error:
            return _refusal(500, str(error))
        finally:
            self.waiting -= 1
        return Response(found, media_type=kind)


def _refusal(status: int, text: str, **headers: str) -> Any:
    """An answer that says on one line why there is no other."""
    from fastapi import Response

    body = json.dumps({"detail": visible(shortened(text, 500))})
    return Response(body, status, headers, media_type="application/json")


def _answered(body: bytes, work: Work) -> bytes:
    """The answer to a request as bytes.

    Raises:
        UserError: The request cannot be read, or `work` refuses it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(body[:8], "little")
        settings = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["settings"])
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError("the body is no safetensors file with the request's settings in its metadata") from None
    try:
        return _safetensors(work(tensors, settings))
    except (RetortError, OutOfMemoryError):
        raise
    except RuntimeError as error:
        if "media_M4" not in tensors:
            raise
        # Families expect their own tokens around images, and fail in their own words where these are missing.
        said = " ".join(str(error).split())
        raise UserError(f"the model cannot read the images where the request has them: {said}") from None


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(dict(tensors))
