"""What servers share: a key that every request brings, and refusals on one line.

`fastapi` is part of the extra `serve`, and imported inside functions.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from retort.errors import shortened, visible
from retort.wire.protocol import HEALTH


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


def refusal(status: int, text: str, **headers: str) -> Any:
    """An answer that says on one line why there is no other."""
    from fastapi import Response

    body = json.dumps({"detail": visible(shortened(text, 500))})
    return Response(body, status, headers, media_type="application/json")
