"""What every server of Retort's does alike: it asks for a key, reads bodies up to a size, and refuses in one line."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from retort.errors import shortened, visible
from retort.wire.protocol import HEALTH

__all__ = ["TooLong", "body_of", "keyed", "refusal"]


class TooLong(Exception):
    """A body is longer than it may be."""


def keyed(app: Any, key: str, refused: Callable[[int, str], Any]) -> None:
    """Has an application of FastAPI ask for a bearer token, for all paths but `HEALTH`.

    Args:
        app: The application.
        key: The token; empty: none is asked for.
        refused: Makes the answer that refuses, of a status and a text.
    """
    from fastapi import Request, Response

    async def check(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "")
        allowed = not key or hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {key}".encode())
        if not allowed and request.url.path != HEALTH:
            return refused(401, "a key is needed")
        return await go_on(request)

    app.middleware("http")(check)


async def body_of(request: Any, most: int) -> bytes:
    """The body of a request.

    Raises:
        TooLong: It has more than `most` bytes; no more of it is read.
    """
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise TooLong
    return bytes(found)


def refusal(status: int, text: str, **headers: str) -> Any:
    """An answer that says on one line why there is no other."""
    from fastapi import Response

    body = json.dumps({"detail": visible(shortened(text, 500))})
    return Response(body, status, headers, media_type="application/json")
