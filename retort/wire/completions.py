"""A server that speaks the OpenAI completions API, as one that scores tokens: ids in, log-probs out.

Servers of this API differ in what they give, and ignore what they do not know. So what a server offers is found by
trying (`explore`), and every answer is checked to be about the ids that were sent (`Completions`). Log-probs are
those of the server's model at temperature 1, over all of its ids, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retort.errors import SignalError, UserError, quoted
from retort.wire.batches import neighbours
from retort.wire.client import Client, MissingPathError

#: The log-probs that a server gave before one token: some ids and their log-probs.
Listed = Mapping[int, float]

#: Most ids of which a whole distribution is fetched as JSON (1.4 MB for a token).
MOST_WHOLE = 20_000
#: Log-probs in one answer, about 70 bytes each.
_MOST_NUMBERS = 200_000
#: How far the log-prob of one token may differ between two requests of a server that computes in bf16, nats.
_NOISE = 0.25
#: How far a log-prob may be above 0 by rounding.
_ROUNDING = 0.01
_ID = "token_id:"


@dataclass(frozen=True)
class Offers:
    """What a server gives.

    Attributes:
        model: Its name of the model.
        context: Longest sequence that it scores, tokens; None where it does not say.
        form: `prompt_logprobs` (of vLLM), or `echo` (of the first API, which other servers have).
        top: Largest k of the top-k before a token; 0: only the log-prob of the token itself.
        whole: Number of ids of its whole distribution, where it gives that; else None.
        at: Largest number of ids of the caller's choice that it gives log-probs of, for one token; 0: none.
    """

    model: str
    context: int | None = None
    form: str = "prompt_logprobs"
    top: int = 0
    whole: int | None = None
    at: int = 0


class Completions:
    """Asks one server of completions.

    Example:
        >>> from retort.wire import Client
        >>> from retort.wire.completions import Completions, Offers
        >>> server = Completions(Client("http://127.0.0.1:8000"), Offers("some-model", context=4095, top=20))
        >>> server.offers.top
        20
    """

    def __init__(self, client: Client, offers: Offers) -> None:
        """Takes a client of the server, and what it offers (see `explore`)."""
        self.client = client
        self.offers = offers

    def listed(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[Listed]]:
        """What the server's model gives before each token but the first of some sequences.

        Args:
            sequences: Ids of each.
            top: The number of most likely ids to list besides the token itself; -1: all ids.

        Returns:
            For each sequence L - 1 lists, of which each holds the token that follows.

        Raises:
            SignalError: An answer is about other ids, or holds what is no log-prob.
            UserError: The server refuses the request.
        """
        width = self.offers.whole or 1 if top < 0 else top + 1
        batches = neighbours([len(ids) * width for ids in sequences], _MOST_NUMBERS)
        answers = self.client.each(lambda batch: self._listed(sequences[batch], top), batches)
        return [own for answer in answers for own in answer]

    def _listed(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[Listed]]:
        read = _FORMS[self.offers.form]
        body = {"model": self.offers.model, "prompt": [list(ids) for ids in sequences], "temperature": 1.0}
        choices = self._choices(body | read.asks(top), len(sequences))
        return [self._checked(read.lists(choice), ids, top) for choice, ids in zip(choices, sequences, strict=True)]

    def at(self, prefixes: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> list[Listed]:
        """What the server's model gives to ids of the caller's choice behind some prefixes.

        A server takes one list of ids for all prefixes of a request: neighbours whose ids fit together share one.

        Args:
            prefixes: Ids before the token in question.
            ids: The ids to score behind each, at most `offers.at` each.

        Raises:
            SignalError: A log-prob is missing or none.
            UserError: The server refuses the request.
        """
        batches, start = list[tuple[range, list[int]]](), 0
        union: dict[int, None] = {}
        for place, own in enumerate(ids):
            grown = union | dict.fromkeys(own)
            if place > start and (len(grown) > self.offers.at or place - start >= _TOGETHER):
                batches.append((range(start, place), list(union)))
                start, grown = place, dict.fromkeys(own)
            union = grown
        if ids:
            batches.append((range(start, len(ids)), list(union)))
        answers = self.client.each(lambda batch: self._at([prefixes[i] for i in batch[0]], batch[1]), batches)
        return [own for answer in answers for own in answer]

    def _at(self, prefixes: Sequence[Sequence[int]], ids: Sequence[int]) -> list[Listed]:
        body = {
            "model": self.offers.model,
            "prompt": [list(own) for own in prefixes],
            "temperature": 1.0,
            "max_tokens": 1,
            "logprobs": 0,
            "logprob_token_ids": list(ids),
            "return_tokens_as_token_ids": True,
        }
        found = list[Listed]()
        for choice in self._choices(body, len(prefixes)):
            (own,) = self._lists(_echoed(choice), 1)
            lacking = next((token for token in ids if token not in own), None)
            if lacking is not None:
                raise self._wrong(f"it was asked for the log-prob of id {lacking}, and does not give it")
            found.append(own)
        return found

    def _choices(self, body: Mapping[str, Any], count: int) -> list[Any]:
        answer = self.client.post_json("/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(own, Mapping) for own in choices):
            raise self._wrong("its answer has no list of choices")
        found = {own.get("index", place): own for place, own in enumerate(choices)}
        if len(choices) != count or sorted(found, key=str) != sorted(range(count), key=str):
            raise self._wrong(f"it was asked for {count} sequences, and answers {len(choices)}")
        return [found[place] for place in range(count)]

    def _checked(self, lists: Any, ids: Sequence[int], top: int) -> list[Listed]:
        """The lists of a sequence, which must be about its ids."""
        if not isinstance(lists, list) or len(lists) != len(ids) or (lists and lists[0] is not None):
            given = f"{len(lists)}" if isinstance(lists, list) else "no list"
            raise self._wrong(f"it was sent {len(ids)} ids, and answers log-probs of {given}")
        found = self._lists([_named(own, token) for own, token in zip(lists[1:], ids[1:], strict=True)], len(ids) - 1)
        for place, (own, token) in enumerate(zip(found, ids[1:], strict=True), 1):
            if token not in own:
                raise self._wrong(f"it was sent id {token} at place {place}, and answers log-probs of other ids")
            if len(own) < min(top, self.offers.whole or top):
                raise self._wrong(f"it was asked for {top} ids at place {place}, and names {len(own)}")
            if top < 0 and self.offers.whole and len(own) != self.offers.whole:
                raise self._wrong(f"it has {self.offers.whole} ids, and names {len(own)} at place {place}")
        return found

    def _lists(self, lists: Sequence[Any], count: int) -> list[Listed]:
        """Lists of ids and log-probs as numbers."""
        if len(lists) != count:
            raise self._wrong(f"it was asked about {count} tokens, and answers about {len(lists)}")
        found = list[Listed]()
        for own in lists:
            if not isinstance(own, Mapping):
                raise self._wrong("a list of log-probs is missing in its answer")
            numbers: dict[int, float] = {}
            for token, logp in own.items():
                number = logp.get("logprob") if isinstance(logp, Mapping) else logp
                name = str(token).removeprefix(_ID)
                usable = isinstance(number, int | float) and not isinstance(number, bool) and number <= _ROUNDING
                if not usable or not name.isascii() or not name.isdigit():
                    raise self._wrong(f"it gives {quoted(logp)} as the log-prob of id {quoted(token)}")
                numbers[int(name)] = min(float(number or 0.0), 0.0)
            found.append(numbers)
        return found

    def _wrong(self, what: str) -> SignalError:
        return SignalError(f"{self.client.url}: {what}; what it says cannot be learnt from")


#: Prefixes of one request.
_TOGETHER = 64


@dataclass(frozen=True)
class _Form:
    """How the log-probs of a prompt are asked for, and where they are in a choice of the answer."""

    asks: Callable[[int], dict[str, Any]]
    lists: Callable[[Any], Any]


def _echoed(choice: Mapping[str, Any]) -> list[Any]:
    """The lists of `logprobs`; where these name no ids, the log-probs of the tokens themselves."""
    found = choice.get("logprobs")
    top, own = map(found.get, ("top_logprobs", "token_logprobs")) if isinstance(found, Mapping) else (None, None)
    if isinstance(top, list) and all(_of_ids(one) for one in top if one is not None):
        return top
    return own if isinstance(own, list) else []


def _of_ids(one: Any) -> bool:
    return isinstance(one, Mapping) and bool(one) and all(str(token).startswith(_ID) for token in one)


def _named(own: Any, token: int) -> Any:
    """A list of ids; a bare number is the log-prob of the token that follows."""
    return {token: own} if isinstance(own, int | float) else own


_FORMS: Mapping[str, _Form] = {
    "prompt_logprobs": _Form(
        lambda top: {"max_tokens": 1, "prompt_logprobs": top},
        lambda choice: choice.get("prompt_logprobs"),
    ),
    "echo": _Form(
        lambda top: {"max_tokens": 0, "echo": True, "logprobs": max(top, 1), "return_tokens_as_token_ids": True},
        _echoed,
    ),
}


def explore(client: Client, model: Offers, highest: int, ordinary: Sequence[int]) -> Completions:
    """Finds out what a server of completions offers, by requests that it may refuse.

    Args:
        client: A client of it.
        model: The model at the server, see `served_model`.
        highest: The largest id that it must take.
        ordinary: Some different ids to try with, three or more.

    Raises:
        UserError: It gives no log-probs of the ids that it is sent.
        UnreachableError: It does not answer.
    """
    for form in _FORMS:
        server = Completions(client, replace(model, form=form))
        if _tried(lambda own=server: own.listed([ordinary], 0)) is not None:
            break
    else:
        raise UserError(
            f"{client.url}: it gives no log-probs of the ids that it is sent, which a teacher must; a server of "
            "completions does with prompt_logprobs (vLLM), or with echo and logprobs"
        )
    if _tried(lambda: server.listed([[*ordinary, highest]], 0)) is None:
        raise UserError(f"{client.url}: it does not take id {highest}, which the tokenizer has; name its own tokenizer")
    server.offers = replace(server.offers, top=_largest_top(server, ordinary, highest))
    if server.offers.top > highest:
        found = _tried(lambda: Completions(client, replace(server.offers, whole=None)).listed([ordinary[:2]], -1))
        count = len(found[0][0]) if found else 0
        server.offers = replace(server.offers, whole=count if count <= MOST_WHOLE else None)
    server.offers = replace(server.offers, at=_largest_at(server, ordinary, highest))
    return server


def served_model(client: Client, name: str | None) -> Offers:
    """The server's model, and its context without the token that is generated besides.

    Args:
        client: A client of it.
        name: Name of the model at the server; None: its only one.

    Raises:
        UserError: It is no server of completions, or has no such model.
        UnreachableError: It does not answer.
    """
    try:
        answer = client.get_json("/v1/models")
    except MissingPathError:
        answer = None
    models = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(models, list):
        raise UserError(
            f"{client.url}: something answers there, but it is neither `retort serve MODEL` nor a server of "
            "completions (/v1/models lists no models)"
        )
    named = {own["id"]: own for own in models if isinstance(own, Mapping) and isinstance(own.get("id"), str)}
    if name is None and len(named) != 1:
        raise UserError(f"{client.url}: it has {len(named)} models ({quoted(sorted(named))}); name one in server.model")
    if name is not None and name not in named:
        raise UserError(f"{client.url}: it has no model {quoted(name)}, but {quoted(sorted(named))}")
    chosen = name or next(iter(named))
    longest = named[chosen].get("max_model_len")
    return Offers(chosen, longest - 1 if isinstance(longest, int) and longest > 1 else None)


def _tried(ask: Callable[[], Any]) -> Any:
    """An answer; None where the server refuses, or answers something else."""
    try:
        return ask()
    except (UserError, SignalError):
        return None


def _largest_top(server: Completions, ordinary: Sequence[int], highest: int) -> int:
    """The largest k of a top-k that the server gives; more than all ids are not tried, as that may end a server."""
    pairs = [[ordinary[0], token] for token in ordinary[1:]]

    def gives(k: int) -> bool:
        found = _tried(lambda: server.listed(pairs, k))
        counts = [len(own) for lists in found or [[{}]] for own in lists]
        # Of two tokens behind the same one, only one is the most likely: besides the other one, that is listed.
        return min(counts) >= k and max(counts) > 1

    return _largest(gives, min(MOST_WHOLE, highest + 1))


def _largest_at(server: Completions, ordinary: Sequence[int], highest: int) -> int:
    """The largest number of chosen ids that the server gives log-probs of; 0 where these are not those of `listed`."""
    known = server.listed([ordinary[:2]], 0)[0][0][ordinary[1]]

    def gives(count: int) -> bool:
        ids = [ordinary[1], *(token for token in range(count) if token != ordinary[1])][:count]
        probe = Completions(server.client, replace(server.offers, at=count))
        found = _tried(lambda: probe.at([ordinary[:1]], [ids]))
        return found is not None and abs(found[0][ordinary[1]] - known) < _NOISE

    return _largest(gives, min(highest + 1, 4096))


def _largest(gives: Callable[[int], bool], most: int) -> int:
    """The largest number that works, 0 if 1 does not; those below one that works do, too."""
    low, high = 0, 1
    while high <= most and gives(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gives(middle) else (low, middle)
    return low


def tokenized(client: Client, model: str, text: str) -> list[int] | None:
    """The ids that the server makes of a text, without what begins every text; None where it does not say."""
    try:
        answer = client.post_json("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    except MissingPathError:
        return None
    found = answer.get("tokens") if isinstance(answer, Mapping) else None
    return found if isinstance(found, list) and all(isinstance(token, int) for token in found) else None
