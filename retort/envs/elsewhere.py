"""An environment behind a server: `rollout.env=http://HOST:PORT`, where `retort serve env:NAME` plays it.

A server that is killed and started again knows nothing of its episodes. All replies follow from the prompt, the member
and what was generated, so an episode is begun anew there, and its turns are played again. Only if the replies are those
of before does it go on; otherwise it ends with an error, and is not learnt from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from retort.align.calls import Call, Malformed
from retort.core.random_streams import key
from retort.core.rollouts import Prompt, Status
from retort.envs import wired
from retort.envs.base import Episode, FailedEpisode, Reply
from retort.errors import RetortError, UnreachableError, UserError, quoted
from retort.wire import Client, is_url
from retort.wire.client import MissingPathError, RefusedError

__all__ = ["CALLS", "REPLAYED", "Elsewhere", "addresses"]

#: Calls of an environment under way at once, for `rollout.turns=ready`.
CALLS = 64
#: The metric that counts the episodes of a step that were begun anew at a server.
REPLAYED = "environment/replayed"
#: How often in a row a server may end in the same turn of an episode before that ends with an error.
_MOST_ENDED = 3
#: Seconds for which a server is waited for before a run.
_FIRST = 5.0

M = TypeVar("M", bound=BaseModel)


def addresses(name: str) -> tuple[str, ...]:
    """The addresses in a name such as `http://a:8000,http://b:8000`; none where it is an environment's name.

    Raises:
        UserError: It holds addresses and something else.
    """
    parts = [part.strip() for part in name.split(",")]
    there = [part for part in parts if is_url(part)]
    other = next((part for part in parts if not is_url(part)), None)
    if there and other is not None:
        raise UserError(
            f"{quoted(other)} stands beside the address {there[0]}: name an environment, which this process plays, or "
            "addresses of servers with commas between"
        )
    return tuple(there)


class Elsewhere:
    """The environment of one server, or of several that play the same: groups are shared out by the prompt's id.

    Attributes:
        name: Name of the environment.
        measures: Names of what it measures.
        rewards: Whether it rewards its episodes; else a verifier does.

    Example:
        >>> from retort.envs.elsewhere import Elsewhere
        >>> from retort.wire import Client
        >>> games = Elsewhere.at([Client("http://127.0.0.1:8000")])  # doctest: +SKIP
        >>> games.name  # doctest: +SKIP
        'rooms'
    """

    def __init__(self, about: wired.About, clients: Sequence[Client], *, tools: bool = False) -> None:
        """Takes what the servers said of themselves; `at` asks them."""
        self.name, self.measures, self.rewards = about.name, tuple(about.measures), about.rewards
        self._servers, self._tools = [_Server(client) for client in clients], tools
        self._lock, self._replayed = threading.Lock(), 0

    @staticmethod
    def at(clients: Sequence[Client], *, tools: bool = False) -> Elsewhere:
        """Asks servers what they play.

        Args:
            clients: One for each server.
            tools: Offer the environment's tools to the chat template.

        Raises:
            UserError: Nothing answers, something else, or another version of Retort; two servers differ; or there are
                no tools.
        """
        first, *others = [_about(client, tools) for client in clients]
        for client, about in zip(clients[1:], others, strict=True):
            if about != first:
                raise UserError(
                    f"{client.url} plays '{about.name}' (Retort {about.version}) and {clients[0].url} '{first.name}' "
                    f"({first.version}); one run plays one environment: start the same on all servers"
                )
        return Elsewhere(first, clients, tools=tools)

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`.

        Raises:
            UserError: A message holds an image; or the server refuses the group, plays something else now, or answers
                nonsense.
            UnreachableError: The server stayed away for the patience of its client.
        """
        server = self._servers[key(0, "environment", prompt.id) % len(self._servers)]

        def begin(own: Sequence[int]) -> tuple[str, list[wired.Begun]]:
            group = uuid.uuid4().hex
            asked = wired.Begin(
                environment=self.name,
                tools=self._tools,
                group=group,
                prompt=wired.SentPrompt.of(prompt),
                members=list(own),
            )
            answer = server.ask(wired.BEGIN, _plain(asked, f"row '{prompt.id}'"))
            if not isinstance(answer, list) or len(answer) != len(own):
                raise UserError(f"{server.client.url}: it did not begin {len(own)} episodes as it was asked to")
            return group, [_read(server, wired.Begun, one) for one in answer]

        group, begun = begin(members)
        found: list[Episode] = []
        for index, (member, one) in enumerate(zip(members, begun, strict=True)):
            own = prompt if one.prompt is None else one.prompt.prompt(prompt)
            if one.failed is not None:
                found.append(FailedEpisode(own, one.failed, one.measures))
                continue
            again = _Again(lambda member=member: begin([member]), self._count, _digest(one))
            found.append(_Playing(own, server, one, again, group, index))
        return found

    def listen(self, say: Callable[[str], object]) -> None:
        """Has lines for the user about servers that are waited for go to `say`."""
        for server in self._servers:
            server.client.say = say

    def metrics(self) -> dict[str, float]:
        """The episodes that were begun anew since the last call."""
        with self._lock:
            found, self._replayed = self._replayed, 0
        return {REPLAYED: float(found)}

    def _count(self) -> None:
        with self._lock:
            self._replayed += 1


@dataclass(eq=False)
class _Server:
    """One server.

    Attributes:
        client: Speaks to it.
        away: Whether it stayed away when it was last asked, for as long as it is waited for.
    """

    client: Client
    away: bool = False

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            found = self.client.post_json(path, body, most_bytes=wired.MOST_BYTES)
        except UnreachableError:
            self.away = True
            raise
        self.away = False
        return found


@dataclass(frozen=True)
class _Again:
    """How an episode begins anew.

    Attributes:
        begin: Begins it in a group of its own; returns the group's name, and what began there.
        count: Is called each time.
        digest: Of what began at first.
    """

    begin: Callable[[], tuple[str, list[wired.Begun]]]
    count: Callable[[], None]
    digest: str


class _GoneError(Exception):
    """The server knows nothing of the episode."""


class _DoubtfulError(Exception):
    """The episode cannot go on as it was; the text says why."""


@dataclass(eq=False)
class _Playing:
    """An episode in progress.

    Attributes:
        prompt: See `Episode`.
        server: Where it is played.
        begun: What its server said of it at first.
        again: How it begins anew.
        group, index: Its name there.
        heard: The turns so far as they were sent, each with a digest of the reply.
        doubt: Why it cannot go on; None: it can.
    """

    prompt: Prompt
    server: _Server
    begun: wired.Begun
    again: _Again
    group: str
    index: int
    heard: list[tuple[Mapping[str, Any], str]] = field(default_factory=lambda: [])
    doubt: str | None = None

    def reply(self, text: str) -> Reply:
        return self._turn(text, None)

    @property
    def called(self) -> Callable[[str, Sequence[Call | Malformed]], Reply] | None:
        return self._called if self.begun.called else None

    @property
    def expert(self) -> Callable[[], list[str]] | None:
        return self._expert if self.begun.expert else None

    def close(self) -> None:
        if self.server.away:  # it drops what nobody asks for
            return
        with contextlib.suppress(RetortError):
            body = {"group": self.group, "index": self.index}
            self.server.client.post_json(wired.CLOSE, body, patience=0, most_bytes=wired.MOST_BYTES)

    def _called(self, text: str, calls: Sequence[Call | Malformed]) -> Reply:
        return self._turn(text, calls)

    def _expert(self) -> list[str]:
        try:
            return list(_read(self.server, wired.Way, self._asked(wired.EXPERT, {})).texts)
        except _DoubtfulError as error:
            self.doubt = str(error)
            return []  # the next turn ends the episode

    def _turn(self, text: str, calls: Sequence[Call | Malformed] | None) -> Reply:
        sent = None if calls is None else [own.model_dump() for own in wired.sent_calls(calls)]
        said = {"turn": len(self.heard) + 1, "text": text, "calls": sent}
        try:
            answer = self._asked(wired.REPLY, said)
        except _DoubtfulError as error:
            self.doubt = str(error)
        if self.doubt is not None:
            return Reply(over=True, status=Status.ERROR, feedback=self.doubt)
        found = _read(self.server, wired.SentReply, answer)
        self.heard.append((said, _digest(found)))
        try:
            return found.reply
        except ValueError as error:
            raise UserError(f"{self.server.client.url}: its reply is none: {error}") from None

    def _asked(self, path: str, more: Mapping[str, Any]) -> Any:
        """The answer to a request about the episode, which begins anew where the server knows nothing of it.

        Raises:
            _DoubtfulError: It is replied to in other ways now, or its server ends again and again.
            RetortError: See `begin_group`.
        """
        if self.doubt is not None:
            raise _DoubtfulError(self.doubt)
        for _ in range(_MOST_ENDED):
            with contextlib.suppress(_GoneError):
                return self._once(path, more)
            with contextlib.suppress(_GoneError):
                self._replay()
        raise _DoubtfulError(
            f"{self.server.client.url} knew nothing of this episode {_MOST_ENDED} times in turn {len(self.heard) + 1}: "
            "its server ends there"
        )

    def _once(self, path: str, more: Mapping[str, Any]) -> Any:
        try:
            return self.server.ask(path, {"group": self.group, "index": self.index, **more})
        except RefusedError as error:
            if error.status == wired.GONE:
                raise _GoneError from None
            raise

    def _replay(self) -> None:
        """Begins the episode anew, and plays its turns again.

        Raises:
            _DoubtfulError: It is another episode.
            _GoneError: The server was started again once more.
        """
        self.again.count()
        self.group, (begun,) = self.again.begin()
        self.index, url = 0, self.server.client.url
        why = f"{url} was started again, and this episode is another one there:"
        if _digest(begun) != self.again.digest:
            raise _DoubtfulError(f"{why} it begins otherwise than before")
        for said, before in self.heard:
            if _digest(_read(self.server, wired.SentReply, self._once(wired.REPLY, said))) != before:
                raise _DoubtfulError(f"{why} turn {said['turn']} has another reply than before")


def _about(client: Client, tools: bool) -> wired.About:
    """What a server plays.

    Raises:
        UserError: See `Elsewhere.at`.
    """
    url = client.url
    try:
        found = client.post_json(
            wired.ABOUT,
            wired.AboutAsked(tools=tools).model_dump(),
            patience=min(client.patience, _FIRST),
            most_bytes=wired.MOST_BYTES,
        )
    except UnreachableError as error:
        raise UserError(f"rollout.env: {error}; `retort serve {wired.PREFIX}NAME` starts one") from None
    except MissingPathError:
        raise UserError(
            f"rollout.env = {url}: something answers there, but it plays no environment (perhaps it serves a model); "
            f"`retort serve {wired.PREFIX}NAME` starts a server that does"
        ) from None
    spoken = found.get("protocol") if isinstance(found, dict) else None
    if spoken != wired.VERSION:
        raise UserError(
            f"rollout.env = {url}: it speaks version {quoted(spoken)} of Retort's protocol for environments, and this "
            f"is {wired.VERSION}; install the same version of Retort on both sides"
        )
    try:
        return wired.About.model_validate(found)
    except ValidationError as error:
        raise UserError(f"rollout.env = {url}: {_first(error)}, in what it says of its environment") from None


def _read(server: _Server, kind: type[M], answer: Any) -> M:
    """An answer as what it should be.

    Raises:
        UserError: It is something else.
    """
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        raise UserError(f"{server.client.url}: its answer cannot be read: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}"


def _plain(asked: BaseModel, where: str) -> dict[str, Any]:
    """A request as JSON.

    Raises:
        UserError: It holds what is none.
    """
    found = asked.model_dump()
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: its messages or tools hold what is no JSON, and cannot be sent to a server"
        ) from None
    return found


def _digest(said: BaseModel) -> str:
    """What tells two answers apart."""
    return hashlib.blake2b(json.dumps(said.model_dump(), sort_keys=True).encode(), digest_size=16).hexdigest()
