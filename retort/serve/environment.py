"""An environment behind a server: `retort serve env:rooms`. Its client is `retort.envs.elsewhere`.

A group is begun once and a turn is played once, however often a client asks for it because an answer was lost. Episodes
that nobody closes are dropped after a while. `fastapi` is part of the extra `serve`; it is imported for a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

import retort
from retort.envs import registry, wired
from retort.envs.base import Environment, Episode, FailedEpisode
from retort.envs.dispatch import raised
from retort.envs.text import MEASURES
from retort.errors import RetortError, UserError
from retort.rollout.waiting import in_thread
from retort.serve.http import guarded, refusal, refused
from retort.wire.protocol import HEALTH

__all__ = ["Episodes", "application"]

#: Seconds after which an episode that nobody asks for is dropped.
IDLE = 3600.0
#: Most episodes that are open, and requests that are worked on or wait at the same time; further ones come back.
MOST_OPEN, MOST_AT_ONCE, MOST_WAITING = 16_384, 64, 4096

B = TypeVar("B", bound=BaseModel)
R = TypeVar("R")


class GoneError(UserError):
    """There is no such episode: it was closed or dropped, or the server was started again."""

    status = wired.GONE


class OtherError(UserError):
    """The request is about something else than is here."""

    status = 409


class FullError(UserError):
    """There is no room for another episode now."""

    status = 429


@dataclass(eq=False)
class _Held:
    """An episode, the number of turns that were played, the last of them, and its reply as JSON."""

    episode: Episode
    prompt_id: str
    turns: int = 0
    last: wired.Turn | None = None
    replied: dict[str, Any] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class _Group:
    """The episodes that were begun together; those that are closed are left out."""

    begun: list[dict[str, Any]] | None = None
    held: dict[int, _Held] = field(default_factory=lambda: {})
    touched: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Episodes:
    """The open episodes of an environment, by group. Methods may be called from several threads."""

    def __init__(self, name: str, *, idle: float = IDLE, most_open: int = MOST_OPEN) -> None:
        """Makes the environment.

        Args:
            name: See `retort.envs.registry.made`.
            idle: Seconds after which a group that nobody asks for is dropped.
            most_open: Most episodes that are open.

        Raises:
            UserError: There is no such environment, or it cannot be made.
        """
        self.name, self.idle, self._most = name, idle, most_open
        self._made: dict[bool, Environment] = {False: registry.made(name)}
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of episodes that are open."""
        with self._lock:
            return sum(len(group.held) for group in self._groups.values())

    def about(self, asked: wired.AboutAsked) -> dict[str, Any]:
        """What is played here.

        Raises:
            UserError: Tools are asked for, and there are none.
        """
        environment = self._environment(asked.tools)
        return wired.About(
            protocol=wired.VERSION,
            version=retort.__version__,
            name=self.name,
            measures=list(getattr(environment, "measures", MEASURES)),
            rewards=registry.rewards(self.name),
        ).model_dump()

    def begin(self, asked: wired.Begin) -> list[dict[str, Any]]:
        """Begins a group, unless that was done already; see `retort.envs.wired.Begun`.

        Raises:
            OtherError: Another environment is meant.
            FullError: There are too many episodes.
            RetortError: See `Environment.begin_group`.
        """
        if asked.environment != self.name:
            raise OtherError(f"this server plays '{self.name}', and not '{asked.environment}'")
        while True:
            with self._lock:
                if asked.group not in self._groups and self._open + len(asked.members) > self._most:
                    raise FullError("too many episodes are open")
                group = self._groups.setdefault(asked.group, _Group())
            with group.lock:
                if group.begun is not None:
                    return group.begun
                if self._groups.get(asked.group) is group:  # else another request for it failed meanwhile
                    return self._begin(asked, group)

    def reply(self, asked: wired.Turn) -> dict[str, Any]:
        """The reply to a turn, which is played unless that was done already.

        An episode whose environment raises is dropped: nobody knows how far it came.

        Raises:
            GoneError, OtherError: See there.
            RetortError: The environment raised.
        """
        held = self._found(asked)
        with held.lock:
            if asked.turn == held.turns and held.last == asked and held.replied is not None:
                return held.replied
            if asked.turn != held.turns + 1:
                raise OtherError(f"turn {asked.turn} of this episode was played otherwise, or is not due")
            try:
                found = self._played(held, asked)
            except BaseException:
                self.close(asked)
                raise
            held.turns, held.last, held.replied = asked.turn, asked, found
            return found

    def expert(self, asked: wired.Named) -> dict[str, Any]:
        """What the episode's expert would do from here.

        Raises:
            GoneError, RetortError: See `reply`.
        """
        held = self._found(asked)
        with held.lock:
            texts = _raising("expert", lambda: list(getattr(held.episode, "expert", list)() or []))
        return wired.Way(texts=[str(text) for text in texts]).model_dump()

    def close(self, asked: wired.Named) -> dict[str, Any]:
        """Closes an episode; of one that is closed nothing is left to do."""
        with self._lock:
            group = self._groups.get(asked.group)
            held = None if group is None else group.held.pop(asked.index, None)
            if group is not None and not group.held:
                del self._groups[asked.group]
        if held is not None:
            _closed(held)
        return {}

    def sweep(self) -> None:
        """Drops the groups that nobody has asked for."""
        now = time.monotonic()
        with self._lock:
            late = [name for name, group in self._groups.items() if now - group.touched > self.idle]
            dropped = [held for name in late for held in self._groups.pop(name).held.values()]
        for held in dropped:
            _closed(held)

    def end(self) -> None:
        """Closes all episodes."""
        with self._lock:
            dropped = [held for group in self._groups.values() for held in group.held.values()]
            self._groups.clear()
        for held in dropped:
            _closed(held)

    @property
    def _open(self) -> int:
        return sum(len(group.held) for group in self._groups.values())

    def _environment(self, tools: bool) -> Environment:
        with self._lock:
            if tools not in self._made:
                self._made[tools] = registry.made(self.name, tools=tools)
            return self._made[tools]

    def _begin(self, asked: wired.Begin, group: _Group) -> list[dict[str, Any]]:
        prompt, environment = asked.prompt.prompt(), self._environment(asked.tools)
        held: list[_Held] = []
        try:
            episodes: Sequence[Episode] = _raising(
                "begin_group", lambda: environment.begin_group(prompt, asked.members)
            )
            held = [_Held(episode, prompt.id) for episode in episodes]
            if len(held) != len(asked.members):
                raise UserError(
                    f"prompt '{prompt.id}': the environment began {len(held)} episodes for {len(asked.members)} "
                    "members; begin_group gives one for each"
                )
            begun = [wired.Begun.of(episode, prompt).model_dump() for episode in episodes]
        except BaseException:
            with self._lock:
                self._groups.pop(asked.group, None)
            for own in held:
                _closed(own)
            raise
        with self._lock:
            group.begun = begun
            group.held = {index: own for index, own in enumerate(held) if not isinstance(own.episode, FailedEpisode)}
            if not group.held:
                self._groups.pop(asked.group, None)
        return begun

    def _played(self, held: _Held, asked: wired.Turn) -> dict[str, Any]:
        where = f"row '{held.prompt_id}': the reply to turn {asked.turn}"
        if asked.calls is None:
            found = _raising("reply", lambda: held.episode.reply(asked.text))
        else:
            try:
                calls = [own.call for own in asked.calls]
            except (ValueError, RecursionError):
                raise UserError(f"{where}: the calls of the turn cannot be read") from None
            episode: Any = held.episode
            found = _raising("called", lambda: episode.called(asked.text, calls))
        return wired.SentReply.of(found, where).model_dump()

    def _found(self, asked: wired.Named) -> _Held:
        with self._lock:
            group = self._groups.get(asked.group)
            if group is None or asked.index not in group.held:
                raise GoneError("there is no such episode here; begin it anew")
            group.touched = time.monotonic()
            return group.held[asked.index]


def application(episodes: Episodes, *, key: str = "") -> Any:
    """The application of a server of an environment, for `uvicorn`.

    Args:
        episodes: Those of the environment.
        key: Bearer token that every request but `/health` must bring; empty: none.

    Raises:
        UserError: The extra `serve` is not installed.
    """
    try:
        from fastapi import FastAPI, Request, Response
    except ImportError as error:
        raise UserError(f"retort serve needs the package '{error.name}': pip install 'retort-distill[serve]'") from None

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(episodes))
        yield
        sweeping.cancel()
        episodes.end()

    hidden: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="retort serve", version=retort.__version__, lifespan=lifespan, **hidden)
    guarded(app, key)
    work = _Work()

    def route(path: str, kind: type[BaseModel], answer: Callable[[Any], Any]) -> None:
        async def posted(request: Request) -> Response:
            return await work(request, kind, answer)

        posted.__annotations__ = {"request": Request, "return": Response}  # those here are names of this function
        app.post(path)(posted)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": retort.__version__, "waiting": work.waiting, "open": len(episodes)}

    async def missing(request: Request, error: Exception) -> Response:
        return refusal(404, f"this server plays the environment '{episodes.name}' and knows nothing else")

    health.__annotations__ = {}
    app.get(HEALTH)(health)
    app.exception_handler(404)(missing)
    route(wired.ABOUT, wired.AboutAsked, episodes.about)
    route(wired.BEGIN, wired.Begin, episodes.begin)
    route(wired.REPLY, wired.Turn, episodes.reply)
    route(wired.EXPERT, wired.Named, episodes.expert)
    route(wired.CLOSE, wired.Named, episodes.close)
    return app


class _Work:
    """Answers requests, each in a thread of its own; `waiting` of them at the moment."""

    def __init__(self) -> None:
        self.waiting, self._room = 0, asyncio.Semaphore(MOST_AT_ONCE)

    async def __call__(self, request: Any, kind: type[B], answer: Callable[[B], Any]) -> Any:
        """The answer to a request whose body is of a kind, or its refusal."""
        from fastapi import Response

        # No page of a browser can send that to another machine by itself.
        if request.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            return refusal(415, "the body is application/json")
        if self.waiting >= MOST_WAITING:
            return refusal(429, f"{self.waiting} requests are waiting")
        self.waiting += 1
        try:
            async with self._room:
                body = bytearray()
                async for part in request.stream():
                    body += part
                    if len(body) > wired.MOST_BYTES:
                        return refusal(413, f"a request has at most {wired.MOST_BYTES:,} bytes")
                found = await asyncio.wrap_future(in_thread(lambda: _answered(bytes(body), kind, answer)))
        except RetortError as error:
            return refused(error)
        finally:
            self.waiting -= 1
        return Response(found, media_type="application/json")


def _answered(body: bytes, kind: type[B], answer: Callable[[B], Any]) -> bytes:
    """The answer to a request as bytes.

    Raises:
        UserError: The request cannot be read; or the answer is no JSON, or too long.
    """
    try:
        asked = kind.model_validate(json.loads(body))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"the body is no request: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (ValueError, RecursionError):
        raise UserError("the body is no JSON") from None
    found = answer(asked)
    try:
        content = json.dumps(found).encode()
    except (TypeError, ValueError, RecursionError):
        raise UserError("the environment's messages or tools hold what is no JSON") from None
    if len(content) > wired.MOST_BYTES:
        raise UserError(f"the environment says more than {wired.MOST_BYTES:,} bytes at once")
    return content


async def _sweep(episodes: Episodes) -> None:
    """Drops what nobody asks for, for as long as the server runs."""
    while True:
        await asyncio.sleep(min(60.0, episodes.idle))
        await asyncio.wrap_future(in_thread(episodes.sweep))


def _raising(method: str, work: Callable[[], R]) -> R:
    """What an environment's own code returns; what it raises in one line.

    Raises:
        RetortError: It raised.
    """
    try:
        return work()
    except RetortError:
        raise
    except Exception as error:
        raise UserError(f"the environment's {raised(method, error)}") from error


def _closed(held: _Held) -> None:
    """Closes an episode, whatever its environment makes of that."""
    with contextlib.suppress(Exception):
        held.episode.close()
