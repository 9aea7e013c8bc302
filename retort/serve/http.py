"""What servers of tensors share: bodies that are bounded, one computation at a time, and refusals on one line.

`fastapi` is part of the extra `serve`, and imported inside functions.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import OutOfMemoryError, Tensor

from retort.errors import RetortError, UserError, shortened, visible
from retort.wire.protocol import CONFLICT, HEALTH, TENSORS

T = TypeVar("T", bound=BaseModel)

#: Seconds after which a client whose request found no room may come back.
_LATER = "1"
#: Bytes of all requests that are read, wait or are computed: 1 GiB. Further ones are told to come back.
_MOST_READ = 2**30
#: Makes an answer of a request's tensors and settings.
Work = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]


class OtherWeightsError(UserError):
    """A request is about other weights than the server has."""

    status = CONFLICT


class TooLargeError(UserError):
    """A request is larger than the server takes."""

    status = 413


def guarded(app: Any, key: str) -> None:
    """Has every request but `/health` of an application bring a bearer token; an empty key: none.

    Args:
        app: Of `fastapi`.
        key: The token.
    """
    from fastapi import Request, Response

    async def keyed(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "")
        allowed = not key or hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode())
        if not allowed and request.url.path != HEALTH:
            return refusal(401, "a key is needed")
        return await go_on(request)

    app.middleware("http")(keyed)


@dataclass
class Bodies:
    """The bytes of all bodies in memory."""

    filled: int = 0


async def posted(request: Any, answer: Callable[[bytes], Awaitable[Any]], read: Bodies, most: int, told: str) -> Any:
    """The answer to a request with a body, or the refusal of one that is too long or of another type."""
    if request.headers.get("Content-Type") != TENSORS:  # no page of a browser can send that by itself
        return refusal(415, f"the body is {TENSORS}: a safetensors file")
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            read.filled += len(part)
            if len(found) > most:
                return refusal(413, told)
            if read.filled > _MOST_READ:
                return refusal(429, "other requests take all memory for them")
        return await answer(bytes(found))
    finally:
        read.filled -= len(found)


class Turns:
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
            return refusal(429, f"{self.waiting} requests are waiting")
        self.waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RetortError as error:
            return refused(error)
        finally:
            self.waiting -= 1
        return Response(found, media_type=kind)


def refusal(status: int, text: str) -> Any:
    """An answer that says on one line why there is no other; one of status 429 says when to come back."""
    from fastapi import Response

    body = json.dumps({"detail": visible(shortened(text, 500))})
    return Response(body, status, {"Retry-After": _LATER} if status == 429 else None, media_type="application/json")


def refused(error: RetortError) -> Any:
    """The refusal of a request that raised an error, by the `status` of its class if it has one."""
    return refusal(getattr(type(error), "status", 400 if isinstance(error, UserError) else 500), str(error))


def answered(body: bytes, work: Work) -> bytes:
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
        return as_safetensors(work(tensors, settings))
    except (RetortError, OutOfMemoryError):
        raise
    except RuntimeError as error:
        if "media_M4" not in tensors:
            raise
        # Families expect their own tokens around images, and fail in their own words where these are missing.
        said = " ".join(str(error).split())
        raise UserError(f"the model cannot read the images where the request has them: {said}") from None


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file."""
    from safetensors.torch import save

    return save(dict(tensors))


def validated(kind: type[T], settings: Any) -> T:
    """The settings of a request.

    Args:
        kind: What they are to be.
        settings: As they were sent.

    Raises:
        UserError: They are none.
    """
    try:
        return kind.model_validate(settings, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
