"""A model behind a server of completions: it has a tokenizer here, and its weights elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from retort.align.stops import StopTokens
from retort.align.tokens import PROBES, encoded, vocabulary_width
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.in_memory import InMemoryModel
from retort.wire.client import Client
from retort.wire.completions import Completions, Offers, explore, served_model, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Ids of the probe.
_PROBE = 24


@dataclass(frozen=True, eq=False)
class Endpoint:
    """A server of completions, as a source beside folders and names of the hub.

    Attributes:
        client: Speaks to it.
        offers: Its model; the rest is found out when it is opened.
        reads: The folder, hub name or object that the model's tokenizer and stops are read from.
        same: Whether that is the student's.
    """

    client: Client
    offers: Offers
    reads: str | InMemoryModel
    same: bool

    @property
    def name(self) -> str:
        """Its address, for messages."""
        return self.client.url

    @staticmethod
    def at(client: Client, model: str | None, reads: str | InMemoryModel, *, same: bool) -> Endpoint:
        """Asks a server which models it has.

        Args:
            client: A client of it.
            model: Name of the model at the server; None: its only one.
            reads: See `Endpoint`.
            same: See `Endpoint`.

        Raises:
            UserError: It is no server of completions, or has no such model.
        """
        return Endpoint(client, served_model(client, model), reads, same)

    def open(self, tokenizer: PreTrainedTokenizerBase, stops: StopTokens) -> EndpointModel:
        """Finds out what the server offers, and checks its tokenizer.

        Args:
            tokenizer: The tokenizer that the model is said to have.
            stops: The stops that the model is said to have.

        Raises:
            UserError: The server cannot be a teacher's, or has other tokens.
            UnreachableError: It does not answer.
        """
        url = self.client.url
        server = explore(self.client, self.offers, vocabulary_width(tokenizer) - 1, _ordinary(tokenizer)[:8])
        notes = [_offered(server, url)]
        said = [(text, tokenized(self.client, server.offers.model, text)) for text in PROBES]
        if all(found is None for _, found in said):
            whose = "the student's tokenizer" if self.same else "the tokenizer in server.tokenizer"
            notes.append(f"{url} does not say how it tokenizes: make sure that its model has {whose}")
        for text, found in said:
            ours = encoded(tokenizer, text)
            if found is not None and found != ours:
                raise UserError(
                    f"{url}: its tokenizer is not {'that of the student' if self.same else 'the one that you named'}: "
                    f"{text[:20]!r} is {found[:8]} there and {(ours or [])[:8]} here; name the folder or hub name of "
                    "its model in server.tokenizer"
                )
        made = EndpointModel(url, tokenizer, stops, server, [], notes)
        made.scores = made.probe()
        return made


class KnownWidth(NamedTuple):
    """A head of which only the number of ids is known."""

    width: int


@dataclass(eq=False)
class EndpointModel:
    """A model that scores behind a server.

    Attributes:
        name: The address, for messages.
        tokenizer: Its tokenizer, which the server was seen to agree with as far as it says.
        stops: Tokens that end its completions.
        server: The server, and what it offers.
        scores: What it said of a probe at the start, log-probs in nats; see `verify`.
        notes: Notes for the user.
    """

    here: ClassVar[bool] = False
    name: str
    tokenizer: PreTrainedTokenizerBase
    stops: StopTokens
    server: Completions
    scores: list[float]
    notes: list[str] = field(default_factory=lambda: [])

    @property
    def image_tokens(self) -> None:
        """None: it is sent token ids only."""
        return None

    @property
    def context(self) -> int:
        """The longest sequence that it scores, tokens."""
        return self.server.offers.context or 2**31

    @property
    def width(self) -> int:
        """Number of its ids, as far as that is known: all that the server has, or those of the tokenizer."""
        return self.server.offers.whole or vocabulary_width(self.tokenizer)

    def check_media(self, sequences: Iterable[TokenSequence], where: str) -> None:
        """Raises `UserError` if one of these holds media; `where` names them."""
        if any(sequence.media for sequence in sequences):
            raise UserError(f"{where} holds an image, a sound or a video, and {self.name} is sent token ids only")

    def check_ids(self, ids: Iterable[int], where: str = "a text") -> None:
        """Raises `UserError` if the server has no such id; `where` names their source."""
        beyond = next((token for token in ids if token >= self.width), None)
        if beyond is not None:
            raise UserError(f"{where} holds id {beyond}, and {self.name} has ids below {self.width} only")

    def head(self) -> KnownWidth:
        """Its head, of which only the width is known."""
        return KnownWidth(self.width)

    def weights(self) -> dict[str, Any]:
        """None of them is here."""
        return {}

    def digest(self) -> str:
        """What tells it from other models of a run: the address, and its name there; not its weights (`verify`)."""
        return f"{self.name} {self.server.offers.model}"

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """As of a model in this process: nothing is spread here."""
        return contextlib.nullcontext()

    def probe(self) -> list[float]:
        """Log-probs that the server gives to a few tokens, nats."""
        ids = _probe(self.tokenizer, self.context)
        (lists,) = self.server.listed([ids], 0)
        return [own[token] for own, token in zip(lists, ids[1:], strict=True)]

    def listen(self, say: Callable[[str], object]) -> None:
        """See `retort.teachers.base.Remote`."""
        self.server.client.say = say

    def verify(self, tolerance: float, before: Sequence[float] | None = None) -> None:
        """Checks that the server still has the model that it had; see `retort.teachers.base.Remote`.

        Raises:
            UserError: It has another one.
            UnreachableError: It does not answer.
        """
        then, now = list(self.scores if before is None else before), self.probe()
        apart = sum(abs(a - b) for a, b in zip(now, then, strict=False)) / max(1, len(now))
        if len(now) != len(then) or not apart <= tolerance:
            raise UserError(
                f"{self.name}: it has another model than before (its log-probs of a probe are {apart:.2g} nats apart "
                f"on average, and server.tolerance is {tolerance:g}); start it with the model that it had"
            )


def _probe(tokenizer: Any, context: int) -> list[int]:
    """Ids of a text, of which the server's log-probs tell whether it still has the same weights."""
    ids = [token for text in PROBES for token in encoded(tokenizer, text) or []]
    return [*_ordinary(tokenizer)[:8], *ids, *_ordinary(tokenizer)][: min(_PROBE, context)]


def _ordinary(tokenizer: Any) -> list[int]:
    """All ids but those of special tokens, in order."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _offered(server: Completions, url: str) -> str:
    offers = server.offers
    ids = f"log-probs of up to {offers.at} ids of the student's" if offers.at else "no log-probs of the student's ids"
    top = f"its top-{offers.top}" if offers.top else "no top-k"
    given = f"whole distributions over {offers.whole} ids" if offers.whole else f"{top} and {ids}"
    return f"{url} gives {given}, found by trying"
