"""A model behind a server of completions: it has a tokenizer here, and its weights elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retort.align.stops import StopTokens
from retort.align.tokens import PROBES, encoded, vocabulary_width
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UserError
from retort.wire.client import Client
from retort.wire.completions import Completions, Listed, explore, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Ids of the probe, and how far a log-prob of it may be from the first answer, nats: other requests of the same batch
#: move a server's numbers in bf16.
_PROBE, _MOVED = 24, 0.5


@dataclass(eq=False)
class EndpointModel:
    """A model that scores behind a server.

    Attributes:
        name: The address, for messages.
        tokenizer: Its tokenizer, which the server was seen to agree with as far as it says.
        stops: Tokens that end its completions.
        server: The server, and what it offers.
        probe: What it gave to a few tokens when it was first asked.
        notes: Notes for the user.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    stops: StopTokens
    server: Completions
    probe: list[Listed]
    notes: list[str] = field(default_factory=lambda: [])

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

    def digest(self) -> str:
        """A fingerprint of what is known of it: its name at the server and its tokenizer; not of its weights."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(f"{self.server.offers.model} {vocabulary}".encode()).hexdigest()

    def check_same(self) -> None:
        """Raises `SignalError` if the server gives other log-probs to its probe than at first: it has other weights."""
        now = self.server.listed([_probe(self.tokenizer)], 0)[0]
        for before, after in zip(self.probe, now, strict=True):
            for token, logp in before.items():
                if token not in after or abs(after[token] - logp) > _MOVED:
                    raise SignalError(
                        f"{self.name}: it gives other log-probs than when the run began ({after.get(token)} instead of "
                        f"{logp} for id {token}): has it another model now? Start it again as it was, and resume"
                    )


def open_endpoint(
    client: Client, trying: Client, tokenizer: PreTrainedTokenizerBase, stops: StopTokens, model: str | None = None
) -> EndpointModel:
    """Opens a model behind a server of completions: finds out what the server offers, and checks its tokenizer.

    Args:
        client: The client that the run will use.
        trying: One with no patience, for questions that a server may refuse.
        tokenizer: The tokenizer that the model is said to have.
        stops: The stops that the model is said to have.
        model: Its name at the server; None: the only one.

    Raises:
        UserError: The server cannot be a teacher's, has other tokens, or no such model.
        UnreachableError: It does not answer.
    """
    server = explore(trying, model, vocabulary_width(tokenizer) - 1, _ordinary(tokenizer)[:8])
    ids = _probe(tokenizer)
    notes = [_offered(server, client.url)]
    said = [(text, tokenized(trying, server.offers.model, text)) for text in PROBES]
    if all(found is None for _, found in said):
        notes.append(
            f"{client.url} does not say how it tokenizes: make sure that its model has the tokenizer that you named"
        )
    for text, found in said:
        if found is not None and found != encoded(tokenizer, text):
            raise UserError(
                f"{client.url}: its tokenizer is another one than you named: {text[:20]!r} is {found[:8]} there and "
                f"{(encoded(tokenizer, text) or [])[:8]} here; set models.NAME.tokenizer to the folder of its model"
            )
    server = Completions(client, server.offers)
    return EndpointModel(client.url, tokenizer, stops, server, server.listed([ids], 0)[0], notes)


def _probe(tokenizer: Any) -> list[int]:
    """Ids of a text, of which the server's log-probs tell whether it still has the same weights."""
    ids = [token for text in PROBES for token in encoded(tokenizer, text) or []]
    return [*_ordinary(tokenizer)[:8], *ids, *_ordinary(tokenizer)][:_PROBE]


def _ordinary(tokenizer: Any) -> list[int]:
    """All ids but those of special tokens, in order."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _offered(server: Completions, url: str) -> str:
    offers = server.offers
    ids = f"log-probs of up to {offers.at} ids of the student's" if offers.at else "no log-probs of the student's ids"
    top = f"its top-{offers.top}" if offers.top else "no top-k"
    given = f"whole distributions over {offers.whole} ids" if offers.whole else f"{top} and {ids}"
    return f"{url} gives {given}, found by trying"
