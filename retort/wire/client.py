"""A client of a server that scores: retries, deadlines, bounded answers, and a key that is never written down.

`httpx2` and `tenacity` are the extra `remote`; they are imported when a client is made.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from retort.errors import UnreachableError, UserError, quoted, shortened, visible
from retort.wire.at_once import at_once

if TYPE_CHECKING:
    from torch import Tensor

_Reason = Literal["unreachable", "timeout", "http"]
T = TypeVar("T")
Item = TypeVar("Item")

#: Environment variable that holds the key of a server.
KEY_VARIABLE = "RETORT_TEACHER_KEY"
#: Seconds that one answer may take, and seconds for which a request that failed is tried again.
TIMEOUT, PATIENCE = 600.0, 600.0
#: Requests under way at once.
CONCURRENCY = 4
#: Seconds for a connection to be made.
_CONNECT = 10.0
#: Seconds before the second attempt, and most seconds between two; a random share is added, so that clients part.
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0
#: Least seconds between two lines for the user about waiting.
_SILENT = 300.0
#: Largest answer that is read, bytes.
_MOST_BYTES = 2**30
#: Answers that may be others a little later: too early, too many requests, and faults of a server or of one before it.
_LATER = (408, 425, 429, 500, 502, 503, 504)
#: Least characters of a key that is looked for in texts.
_SECRET = 8
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TENSORS = "application/octet-stream"


def is_url(name: str) -> bool:
    """Whether a model's name is the address of a server."""
    return name.startswith(("http://", "https://"))


class Client:
    """Speaks to one server. Methods may be called from several threads.

    A connection that is refused or breaks off, a time-out, and the answers 408, 425, 429 and 5xx are tried again, at
    growing intervals with a random part (`Retry-After` counts as the least), until `patience` is used up.

    Attributes:
        say: Takes a line for the user where a request has to be made again; at most one in five minutes.

    Example:
        >>> from retort.wire import Client
        >>> client = Client("http://127.0.0.1:8000", patience=0)
        >>> client.url
        'http://127.0.0.1:8000'
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = KEY_VARIABLE,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: Address of the server, with or without a path.
            key_variable: Environment variable with a bearer token; the token itself is in no message and no file.
            timeout: Seconds that one answer may take, to its last byte.
            patience: Seconds for which a request is tried again, counted from its first failure.
            concurrency: Requests under way at once, see `each`.

        Raises:
            UserError: The address is not one of a server, holds a password, or the extra `remote` is not installed.
        """
        try:
            import httpx2
            import tenacity  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{url} is a server, which needs the package '{error.name}': pip install 'retort-distill[remote]'"
            ) from None
        self.url = _checked(url, key_variable).rstrip("/")
        self.timeout, self.patience, self.concurrency = timeout, patience, concurrency
        self._key_variable, self._given_up = key_variable, threading.Event()
        self.say: Callable[[str], object] = lambda text: None
        self._told = -math.inf
        key = self._key = os.environ.get(key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in {key_variable} is none: it holds what a header cannot; set it anew")
        self._http = httpx2.Client(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(timeout, connect=min(_CONNECT, timeout)),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            # A proxy of the environment is not asked for this machine itself.
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
        )
        weakref.finalize(self, self._http.close)  # a run has no place where the models that it asked are put away

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def get_json(self, path: str, *, patience: float | None = None) -> Any:
        """The JSON at a path.

        Args:
            path: Begins with `/`; it follows the address.
            patience: Seconds instead of the client's.

        Raises:
            UnreachableError: There was no usable answer within the patience.
            UserError: The server refuses the request.
        """
        return self._answer("GET", path, None, {}, read=_json, patience=patience)

    def post_json(self, path: str, body: Any, *, patience: float | None = None, most_bytes: int = _MOST_BYTES) -> Any:
        """The JSON that the server answers to some JSON; see `get_json`, and `post_tensors` for `most_bytes`.

        The request may be made several times, so it must change nothing on the server.
        """
        headers = {"Content-Type": "application/json"}
        content = json.dumps(body, allow_nan=False).encode()
        return self._answer("POST", path, content, headers, read=_json, patience=patience, most_bytes=most_bytes)

    def get_tensors(self, path: str, *, most_bytes: int = _MOST_BYTES) -> dict[str, Tensor]:
        """The tensors at a path, sent as safetensors; see `post_tensors`."""
        return self._answer("GET", path, None, {}, read=_tensors, most_bytes=most_bytes)

    def post_tensors(
        self, path: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, most_bytes: int = _MOST_BYTES
    ) -> dict[str, Tensor]:
        """The tensors that the server answers to some tensors; safetensors both ways, so nothing is unpickled.

        Args:
            path: See `get_json`.
            tensors: By name, on the CPU.
            settings: What else the request says, as JSON in the file's metadata.
            most_bytes: Largest answer that is read.

        Raises:
            UnreachableError: There was no usable answer within the patience.
            UserError: The server refuses the request, or answers at greater length.
        """
        from safetensors.torch import save

        content = save({name: own.contiguous() for name, own in tensors.items()}, {"settings": json.dumps(settings)})
        headers = {"Content-Type": _TENSORS}
        return self._answer("POST", path, content, headers, read=_tensors, most_bytes=most_bytes)

    def each(
        self,
        work: Callable[[Item], T],
        items: Sequence[Item],
        on_result: Callable[[int, T], None] = lambda place, result: None,
    ) -> list[T]:
        """The results of some work on each item, in order; at most `concurrency` are under way at once.

        Args:
            work: The work.
            items: The items.
            on_result: Takes the place of an item and its result as soon as that is there; called in this thread.

        Raises:
            RetortError: What the first item (in order) that failed raised.
        """
        return at_once(work, items, self.concurrency, self._given_up, on_result)

    def without_key(self, text: str) -> str:
        """A text of the server's without the key that it was sent: some repeat it where they refuse it."""
        # Short ones are no secrets: servers without keys are given any word.
        return text.replace(self._key, f"[the key in {self._key_variable}]") if len(self._key) >= _SECRET else text

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    def _answer(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str],
        *,
        read: Callable[[bytes], T],
        patience: float | None = None,
        most_bytes: int = _MOST_BYTES,
    ) -> T:
        """What `read` makes of an answer, after as many attempts as it takes."""
        import tenacity

        patience = self.patience if patience is None else patience
        grows = tenacity.wait_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT)
        usual = grows + tenacity.wait_random(0, _FIRST_WAIT)
        failed_at, planned = list[float](), dict[int, float]()

        def wait(state: Any) -> float:
            number = state.attempt_number
            if number not in planned:  # drawn once: whether there is time left and how long to wait are one question
                planned[number] = max(usual(state), getattr(state.outcome.exception(), "after", 0.0))
            return planned[number]

        def spent(state: Any) -> bool:
            failed_at.append(time.monotonic())
            return self._given_up.is_set() or failed_at[-1] - failed_at[0] + wait(state) > patience

        passing = tenacity.retry_if_exception_type(_PassingError)
        attempts = tenacity.Retrying(retry=passing, wait=wait, stop=spent, sleep=self._rest, reraise=True)
        attempts.before_sleep = self._tell
        try:
            return attempts(lambda: read(self._once(method, path, content, headers, most_bytes)))
        except _PassingError as error:
            tried = f"after {len(failed_at)} attempts" if len(failed_at) > 1 else "at the first attempt"
            raise UnreachableError(
                f"{self.url}: {self.without_key(str(error))} ({tried}); look at the server, and start it again as it "
                "was if it is gone",
                error.reason,
            ) from None

    def _tell(self, state: Any) -> None:
        """Says that a request failed and is made again, unless that was said a little while ago."""
        now = time.monotonic()
        if now - self._told >= _SILENT:  # two threads may both say so, which does no harm
            self._told = now
            self.say(f"{self.url}: {state.outcome.exception()}; it is asked again for up to {self.patience:g} seconds")

    def _rest(self, seconds: float) -> None:
        """Waits between two attempts, unless `each` gives up meanwhile."""
        self._given_up.wait(seconds)

    def _once(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str], most_bytes: int
    ) -> bytes:
        """One attempt."""
        import httpx2

        ends = time.monotonic() + self.timeout
        try:
            with self._http.stream(method, f"{self.url}{path}", content=content, headers=headers) as answer:
                found = bytearray()
                limit = most_bytes if answer.status_code == 200 else 10_000
                for part in answer.iter_bytes():
                    found += part
                    if time.monotonic() > ends:
                        raise _PassingError(f"no whole answer within {self.timeout:g} seconds", "timeout")
                    if len(found) > limit:
                        break
        except httpx2.TimeoutException:
            raise _PassingError(f"no answer within {self.timeout:g} seconds", "timeout") from None
        except httpx2.TransportError as error:
            raise _PassingError(_words(error), "unreachable") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise UserError(f"{self.url}: {_words(error)}") from None
        if answer.status_code == 200:
            if len(found) > most_bytes:
                raise UserError(f"{self.url}{path}: the answer is longer than {most_bytes:,} bytes; that is no answer")
            return bytes(found)
        self._refused(path, answer, bytes(found))

    def _refused(self, path: str, answer: Any, body: bytes) -> NoReturn:
        """Raises what an answer other than 200 means."""
        said, status = _said(body, self.without_key), answer.status_code
        if status in _LATER:
            raise _PassingError(f"it answers {status}{said}", after=_seconds(answer.headers.get("Retry-After")))
        if status in (401, 403):
            raise RefusedError(
                f"{self.url}: it answers {status}{said}; put its key into the environment variable "
                f"{self._key_variable}",
                status,
            )
        if 300 <= status < 400:
            raise UserError(f"{self.url}: it sends elsewhere ({status}); name the address that answers itself")
        kind = MissingPathError if status in (404, 405, 501) else RefusedError
        raise kind(f"{self.url}{path}: it answers {status}{said}", status)


class RefusedError(UserError):
    """The server refuses a request.

    Attributes:
        status: What it answered, such as 400.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        """Takes the line for the user, and the status."""
        super().__init__(text)
        self.status = status


class MissingPathError(RefusedError):
    """The server knows no such path: it is one of another kind."""


class _PassingError(Exception):
    """A failure that may pass, its reason, and the seconds after which the server wants to be asked again."""

    def __init__(self, text: str, reason: _Reason = "http", after: float = 0.0) -> None:
        super().__init__(text)
        self.reason: _Reason = reason
        self.after = after


def _checked(url: str, key_variable: str) -> str:
    """The address as it is.

    Raises:
        UserError: It is none of a server, or holds what must not be written into files.
    """
    wrong = None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise UserError(f"{quoted(url)}: no address of a server; write it as http://HOST:PORT") from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"an address with a name or a key in it would be written into files; put it into {key_variable}"
        )
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        wrong = "no address of a server"
    elif parts.query or parts.fragment or "?" in url or "#" in url:
        wrong = "an address with a query"
    if wrong is not None:
        raise UserError(f"{quoted(url)}: {wrong}; write it as http://HOST:PORT")
    return url


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _PassingError(f"its answer is no JSON: {quoted(content[:80])}") from None


def _tensors(content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError):
        raise _PassingError(f"its answer is no whole safetensors file ({len(content):,} bytes)") from None


def _words(error: Exception) -> str:
    """What is wrong with a connection, on one line."""
    text = " ".join(visible(str(error)).split()) or type(error).__name__
    return "it cannot be connected to" + (f": {shortened(text, 200)}" if text else "")


def _said(body: bytes, without_key: Callable[[str], str]) -> str:
    """What a server says about a refusal, for a message: hostile text, so one short line of it."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    for name in ("detail", "error", "message"):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
    return f": {visible(shortened(without_key(found), 200))}" if isinstance(found, str) and found else ""


def _seconds(header: str | None) -> float:
    """The seconds of a header `Retry-After`; 0 where there are none that count."""
    try:
        return min(max(float(header or 0), 0.0), 3600.0)
    except ValueError:
        return 0.0
