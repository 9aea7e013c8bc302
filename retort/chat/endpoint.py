"""A model behind any server of OpenAI's chat completions, hosted or one's own.

Servers differ in what they take. What one takes is found by trying: a request that it refuses is made again without
what it may not know, and what helped is remembered. Nothing that a server sends is trusted beyond its form.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from retort.chat.base import ChatReply, ChatRequest, Failure, Heard
from retort.chat.breaker import Breaker
from retort.core.rollouts import Message
from retort.errors import UnreachableError, UserError, quoted, shortened, visible
from retort.wire.client import CONCURRENCY, Client, MissingPathError, RefusedError

__all__ = ["KEY_VARIABLE", "PATIENCE", "TIMEOUT", "ChatEndpoint"]

#: Environment variable that holds the key, unless the user names another.
KEY_VARIABLE = "RETORT_JUDGE_KEY"
#: Seconds that one answer may take, and seconds for which a request that failed is tried again.
TIMEOUT, PATIENCE = 120.0, 120.0
#: Answers to a request that another form of it may not get.
_OTHER_FORM = (400, 404, 422)
#: No credit, no key, no permission: what only the user can mend.
_USERS = (401, 402, 403, 404)
#: Largest answer that is read, bytes.
_MOST_BYTES = 2**26
#: Most tokens that an answer is believed to have.
_MOST_TOKENS = 2**31
#: Tokens of the answer to a request that only asks whether there is such a model.
_TRIAL_TOKENS = 16
_PATH = "/chat/completions"


@dataclass(eq=False)
class _Takes:
    """What a server takes, as far as it is known: options by name, and each schema by its digest.

    Attributes:
        known: Options that were part of a request that it answered.
        left_out: Options without which it answered, and with which it did not.
    """

    known: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)


class ChatEndpoint:
    """A model behind a server of chat completions; a `ChatModel`.

    A request is tried again as `retort.wire.Client` does: refused connections, time-outs, 408, 425, 429 and 5xx, at
    growing intervals, until the patience is used up. After several requests in a row without an answer the rest of a
    batch is not asked. The answer to a schema keeps to it only where the server enforces it.

    Attributes:
        model: The model's name at the server.
        say: Takes a line for the user.

    Example:
        >>> from retort.chat.endpoint import ChatEndpoint
        >>> judge = ChatEndpoint("https://api.example.com/v1", model="some-model")
        >>> judge.name
        'some-model at https://api.example.com/v1'
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key_variable: str = KEY_VARIABLE,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        requests: int = CONCURRENCY,
    ) -> None:
        """Connects to nothing yet, see `check`.

        Args:
            url: Address of the server, such as `https://api.example.com/v1`; one without a path gets `/v1`.
            model: The model's name at the server; None: its only one, which is asked for.
            key_variable: Environment variable that holds the key, which is written nowhere.
            timeout: Seconds that one answer may take.
            patience: Seconds for which a request that failed is tried again.
            requests: Requests under way at once.

        Raises:
            UserError: The address is none of a server's, or the extra `remote` is missing.
        """
        self.client = Client(
            _base(url), key_variable=key_variable, timeout=timeout, patience=patience, concurrency=requests
        )
        self.model = model or ""
        self.say: Callable[[str], object] = lambda text: None
        self._takes, self._breaker = _Takes(), Breaker()
        self._exploring, self._hearing = threading.RLock(), threading.Lock()

    @property
    def name(self) -> str:
        """See `ChatModel`."""
        return f"{self.model or 'a model'} at {self.client.url}"

    @property
    def fingerprint(self) -> str:
        """See `ChatModel`: a digest of address and name, as a server does not show its weights."""
        return hashlib.sha256(json.dumps([self.client.url, self.model]).encode()).hexdigest()

    def listen(self, say: Callable[[str], object]) -> None:
        """Has lines for the user taken by `say` from now on: what a server does not take, and waiting."""
        self.say = self.client.say = say

    def check(self) -> None:
        """Finds out whether the model is there, and its name where none was given.

        A model that the server does not list is asked for a few tokens: some have names that they do not list.

        Raises:
            UserError: There is no such model, the key is refused, or something else answers there.
            UnreachableError: Nothing answers within the patience.
        """
        listed = self._listed()
        if not self.model:
            if listed is None:
                raise UserError(f"{self.client.url}: it does not list its models; name one in judge.name")
            if len(listed) != 1:
                raise UserError(
                    f"{self.client.url}: it has {len(listed)} models ({quoted(listed)}); name one in judge.name"
                )
            self.model = listed[0]
        elif listed is None or self.model not in listed:
            self._try_model(listed)

    def chat(self, requests: Sequence[ChatRequest], heard: Heard | None = None) -> list[ChatReply | Failure]:
        """See `ChatModel`."""
        found: dict[int, ChatReply | Failure] = {}
        # A server that was given up is tried once, not for as long as the patience lasts.
        first = 0.0 if self._breaker.open else None
        self._breaker.half_open()

        def one(number: int, patience: float | None = None) -> None:
            answer = self._answer(requests[number], patience)
            with self._hearing:  # those who keep answers need not know of threads
                found[number] = answer
                if heard is not None:
                    heard(number, answer)

        numbers = range(len(requests))
        if requests and (self._breaker.suspicious or not self._options(requests[0]) <= self._takes.known):
            one(0, first)  # alone: the others profit from what it finds out
            numbers = numbers[1:]
        self.client.each(one, numbers)
        return [found[number] for number in range(len(requests))]

    def _listed(self) -> list[str] | None:
        """Names of the server's models; None where it does not list them."""
        try:
            answer = self.client.get_json("/models")
        except MissingPathError:
            return None
        models = answer.get("data") if isinstance(answer, Mapping) else answer
        if not isinstance(models, list):
            return None
        names = [own.get("id") for own in models if isinstance(own, Mapping)]
        return sorted({visible(shortened(name, 1000)) for name in names if isinstance(name, str) and name})

    def _try_model(self, listed: list[str] | None) -> None:
        """Asks for a few tokens.

        Raises:
            UserError: The server does not answer, or not as this model.
        """
        there = f"it has {quoted(listed, 300)}" if listed else "it lists none"
        try:
            answer = self._asked(ChatRequest("trial", (Message("user", "Hello"),), _TRIAL_TOKENS))
        except RefusedError as error:
            if error.status in (401, 402, 403):
                raise
            raise UserError(f"{error}; the model is {quoted(self.model)}, and {there}: see judge.name") from None
        if isinstance(answer, Failure) and answer.reason == "http":
            raise UserError(f"{answer.message}; the model is {quoted(self.model)}, and {there}: see judge.name")

    def _answer(self, request: ChatRequest, patience: float | None) -> ChatReply | Failure:
        """The answer to one request."""
        if self._breaker.open:
            return Failure(
                "unreachable",
                f"{self.client.url}: not asked, after {self._breaker.in_a_row} failures in a row",
                asked=False,
            )
        try:
            answer = self._asked(request, patience)
        except UnreachableError as error:
            self._breaker.note(False)
            return Failure(error.reason, str(error))
        except RefusedError as error:
            if error.status in _USERS:
                raise
            self._breaker.note(True)
            return Failure("http", str(error))
        except UserError as error:
            self._breaker.note(False)
            return Failure("http", str(error))
        self._breaker.note(True)
        return answer

    def _options(self, request: ChatRequest) -> set[str]:
        """What of a request a server may not take."""
        schema = set() if request.schema is None else {_schema_name(request.schema)}
        return ({"max_tokens", "temperature", "seed"} | schema) - self._takes.left_out

    def _asked(self, request: ChatRequest, patience: float | None = None) -> ChatReply | Failure:
        """The answer of the server, in the form of request that it takes.

        Raises:
            UserError: It refuses every form.
            UnreachableError: It does not answer.
        """
        options = self._options(request)
        if options <= self._takes.known:
            return self._once(request, options, patience)
        with self._exploring:
            options = self._options(request)  # another thread may have found out
            try:
                answer = self._once(request, options, patience)
            except RefusedError as error:
                if error.status not in _OTHER_FORM:
                    raise
                options, answer = self._in_another_form(request, options, error)
            self._takes.known |= options
            return answer

    def _in_another_form(
        self, request: ChatRequest, options: set[str], refusal: RefusedError
    ) -> tuple[set[str], ChatReply | Failure]:
        """Leaves out options that the server was not seen to take: those that it names, else each, else all.

        Raises:
            RefusedError: It refuses every form.
        """
        doubtful, tried = sorted(options - self._takes.known, key=_least_first), list[set[str]]()

        def without(left_out: set[str]) -> ChatReply | Failure | RefusedError:
            tried.append(left_out)
            try:
                return self._once(request, options - left_out)
            except RefusedError as error:
                if error.status not in _OTHER_FORM:
                    raise
                return error

        left_out, answer = set[str](), refusal
        while isinstance(answer, RefusedError) and (more := _named(doubtful, str(answer)) - left_out):
            left_out |= more
            answer = without(set(left_out))
        for trial in [*({one} for one in doubtful), set(doubtful)]:
            if isinstance(answer, RefusedError) and trial and trial not in tried:
                left_out, answer = trial, without(trial)
        if isinstance(answer, RefusedError):
            raise refusal
        self._takes.left_out |= left_out
        names = ", ".join(sorted("a JSON schema" if one.startswith("schema") else one for one in left_out))
        self.say(f"{self.name}: it does not take {names}, and is asked without from now on")
        return options - left_out, answer

    def _once(self, request: ChatRequest, options: set[str], patience: float | None = None) -> ChatReply | Failure:
        """One request with the options that the server is thought to take."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message.as_dict() for message in request.messages],
            "max_tokens" if "max_tokens" in options else "max_completion_tokens": request.max_tokens,
        }
        body |= {"temperature": request.temperature} if "temperature" in options else {}
        body |= {"seed": request.seed % 2**31} if "seed" in options else {}
        if request.schema is not None and _schema_name(request.schema) in options:
            schema = {"name": request.purpose, "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        answer = self.client.post_json(_PATH, body, patience=patience, most_bytes=_MOST_BYTES)
        return self._read(request, answer)

    def _read(self, request: ChatRequest, answer: Any) -> ChatReply | Failure:
        """What an answer of the server says."""
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
            return Failure("http", f"{self.client.url}: its answer is no chat completion")
        text = self.client.without_key(_text(message.get("content")))
        usage = answer.get("usage")
        used: Mapping[str, Any] = usage if isinstance(usage, Mapping) else {}
        read = sum(len(own.content.encode("utf-8", "replace")) for own in request.messages)
        tokens = (
            _count(used.get("prompt_tokens"), read),
            _count(used.get("completion_tokens"), len(text.encode("utf-8", "replace"))),
        )
        refusal, ended = message.get("refusal"), choice.get("finish_reason")
        if (isinstance(refusal, str) and refusal) or ended == "content_filter":
            words = self.client.without_key(refusal) if isinstance(refusal, str) else ""
            why = f": {visible(shortened(words, 200))}" if words else ""
            return Failure("refused", f"{self.name} refuses to answer{why}", *tokens)
        return ChatReply(text, *tokens, ended=ended != "length")


#: Words in a refusal that name an option, and those that name a schema.
_WORDS = {"max_tokens": ("max_tokens", "max_completion_tokens"), "temperature": ("temperature",), "seed": ("seed",)}
_SCHEMA_WORDS = ("response_format", "json_schema", "schema", "structured", "grammar")


def _named(options: Sequence[str], refusal: str) -> set[str]:
    """The options that a refusal names."""
    return {one for one in options if any(word in refusal for word in _WORDS.get(one, _SCHEMA_WORDS))}


def _least_first(option: str) -> tuple[int, str]:
    """Orders options by what is lost without them, the least first."""
    order = ["max_tokens", "seed", "temperature"]
    return (order.index(option) if option in order else len(order)), option


def _schema_name(schema: Mapping[str, Any]) -> str:
    return "schema " + hashlib.sha256(json.dumps(schema, sort_keys=True, default=dict).encode()).hexdigest()[:16]


def _text(content: Any) -> str:
    """The text of a turn; some servers send it in parts, of which thoughts are some."""
    if isinstance(content, list):
        parts = [own.get("text") for own in content if isinstance(own, Mapping) and own.get("type") == "text"]
        content = "".join(part for part in parts if isinstance(part, str))
    text = content if isinstance(content, str) else ""
    return text.encode("utf-8", "replace").decode()  # a lone surrogate, which JSON can hold, is no text


def _count(found: Any, otherwise: int) -> int:
    """A number of tokens as the server counts; where it does not, of bytes, which are at least as many."""
    return found if type(found) is int and 0 <= found < _MOST_TOKENS else otherwise


def _base(url: str) -> str:
    """The address below which the paths of the API lie."""
    url = url.rstrip("/").removesuffix(_PATH).rstrip("/")
    try:
        return url if urlsplit(url).path else f"{url}/v1"
    except ValueError:  # the client says what is wrong with it
        return url
