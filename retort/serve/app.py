"""The HTTP of `retort serve`. `fastapi` is part of the extra `serve`, and imported when a server is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import retort
from retort.errors import UserError
from retort.serve.http import Bodies, Turns, Work, answered, as_safetensors, guarded, posted
from retort.serve.scorer import Scorer
from retort.wire.media import MOST_SENT
from retort.wire.protocol import ABOUT, FILES, GENERATE, HEAD, HEALTH, HIDDEN, IMAGES, SCORE, TENSORS

#: Bytes of a request for each token: its id, whether it was decided, what else may be said of it.
_TOKEN_BYTES = 64
#: Bytes of a request besides its tokens or images.
_ENVELOPE = 2**20


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
    guarded(app, key)
    compute, read = Turns(most_waiting), Bodies()

    def route(path: str, work: Work, most: int, told: str) -> None:
        async def answer(request: Request) -> Response:
            return await posted(request, lambda body: compute(lambda: answered(body, work), TENSORS), read, most, told)

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
    page(HEAD, lambda: as_safetensors(scorer.head()), TENSORS)
    tokens = (scorer.most_tokens * _TOKEN_BYTES + _ENVELOPE, f"a request has at most {scorer.most_tokens} tokens")
    route(HIDDEN, scorer.hidden, *tokens)
    route(SCORE, scorer.score, *tokens)
    route(GENERATE, scorer.generate, *tokens)
    route(IMAGES, scorer.hold, MOST_SENT + _ENVELOPE, f"a request sends at most {MOST_SENT:,} bytes of images")
    return app
