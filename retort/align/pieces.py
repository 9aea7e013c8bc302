r"""The bytes that each token of a completion spells.

A tokenizer is understood by what its tokens look like and how it decodes them: byte-level (`Ġ`), or a mark for a blank
(`▁`) with or without tokens for single bytes (`<0xNN>`). What it makes of a completion is compared with its own decode
of the whole, every time. Where that differs, or a tokenizer is neither (WordPiece, tokens joined by blanks), the bytes
come from decoding one token more at a time; then the bytes of a character that several tokens spell belong to the last
of them, and the others are empty.

A control token spells nothing that a text could hold: its piece begins with 0xFF, which no UTF-8 contains.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from retort.align.text import control_tokens, decode
from retort.align.tokens import PROBES, encoded
from retort.errors import SignalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STOP", "PieceTable", "inner_pieces", "piece_table", "pieces", "shown_pieces", "unknown_token"]

#: First byte of a control token's piece.
_CONTROL = b"\xff"
#: The piece of every token that ends a completion.
STOP = _CONTROL + b"<stop>"
#: Stands for each character at the end that is not whole, where a tokenizer does not say which bytes it has. No
#: character begins with it.
_PART = b"\x80"
#: Ids before a completion that are decoded with it: a tokenizer may treat the beginning of a text differently.
_TAIL = 16
_BLANK = "\u2581"
_SINGLE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TABLES: WeakKeyDictionary[Any, PieceTable] = WeakKeyDictionary()


@dataclass(eq=False)
class PieceTable:
    """What is known about the tokens of one tokenizer, without the tokenizer itself.

    Attributes:
        size: Number of tokens that the tokenizer had.
        tokens: Each id's token, as the vocabulary has it.
        control: Pieces of control tokens.
        spellings: Names of the ways in which tokens may spell bytes: one by the decoder of a fast tokenizer, for a slow
            one those that fit what it makes of some texts, and none where only decoding tells.
    """

    size: int
    tokens: dict[int, str]
    control: dict[int, bytes]
    spellings: list[str]
    _found: dict[str, dict[int, bytes]] = field(default_factory=lambda: {})

    def is_text(self, token: int) -> bool:
        """Whether an id is a token that spells text: neither a control token nor beyond the vocabulary."""
        return token in self.tokens and token not in self.control

    def control_piece(self, token: int) -> bytes:
        """The piece of an id that spells no text."""
        return self.control.get(token, _CONTROL + b"#%d" % token)

    def spell(self, ids: Sequence[int], spelling: str) -> list[bytes]:
        """The bytes of tokens in one way of spelling, inside a text; control tokens have their own pieces."""
        known = self._found.setdefault(spelling, {})
        for token in ids:
            if token not in known:
                text = self.is_text(token)
                known[token] = _spelt(self.tokens[token], spelling) if text else self.control_piece(token)
        return [known[token] for token in ids]

    def is_single(self, token: int, spelling: str) -> bool:
        """Whether a token stands for one byte by name (`<0xNN>`)."""
        return spelling == "fallback" and _SINGLE.fullmatch(self.tokens[token]) is not None


def piece_table(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] = ()) -> PieceTable:
    """What is known about a tokenizer's tokens; cached, because every completion asks for it.

    Args:
        tokenizer: The tokenizer.
        ids: Ids that the caller has; where one is new, the tokenizer may have got more tokens.
    """
    found = _TABLES.get(tokenizer)
    # The size of a vocabulary takes as long as a whole completion, so it is not asked for every time.
    if found is None or (any(token not in found.tokens for token in ids) and found.size != len(tokenizer)):
        control = {token: _CONTROL + name.encode() for name, token in control_tokens(tokenizer).items()}
        tokens = {token: name for name, token in tokenizer.get_vocab().items()}
        found = PieceTable(len(tokenizer), tokens, control, _spellings(tokenizer))
        if len(found.spellings) > 1:
            found.spellings = [spelling for spelling in found.spellings if _fits_probes(tokenizer, found, spelling)]
        _TABLES[tokenizer] = found
    return found


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    before: Sequence[int] = (),
    *,
    stops: Collection[int] = (),
) -> list[bytes]:
    r"""The bytes that each token of a completion spells.

    Those of all text tokens, joined, are the bytes of the completion as the tokenizer decodes it; a tokenizer that
    drops a blank at the beginning of a text (SentencePiece) keeps it behind a prompt.

    Args:
        tokenizer: Tokenizer of the model that generated it.
        ids: N ids of the completion.
        before: Ids before it, of which the last few matter; none if the completion begins the text.
        stops: Ids that end a completion. Their piece is `STOP`, whatever they are called.

    Returns:
        N pieces. That of a control token is 0xFF and its name; that of an id without a token 0xFF, `#` and the id.

    Raises:
        SignalError: The tokenizer decodes the whole differently from its parts.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from retort.align.pieces import pieces
        >>> inner = Tokenizer(models.WordLevel({"▁one": 0, "<0xF0>": 1, "<s>": 2}, unk_token="<s>"))
        >>> inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
        >>> pieces(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>"), [0, 1, 2], before=[0], stops=[2])
        [b' one', b'\xf0', b'\xff<stop>']
    """
    found = _found(tokenizer, ids, before, alone=not before)
    if not stops:
        return found
    return [STOP if token in stops else piece for token, piece in zip(ids, found, strict=True)]


def inner_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes that tokens spell inside a text: a mark for a blank is one, also at the beginning.

    They are not checked against the decoded text, because the caller knows the text.

    Args:
        tokenizer: Their tokenizer.
        ids: N ids.

    Returns:
        N pieces; see `pieces`.
    """
    table = piece_table(tokenizer, ids)
    if len(table.spellings) == 1:
        return table.spell(ids, table.spellings[0])
    return _found(tokenizer, ids, (), alone=False)


def shown_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    r"""Tokens inside a text, as one reads them: a control token by its name, a part of a character as `\xf0`."""
    try:
        spelt = inner_pieces(tokenizer, ids)
    except SignalError:  # what is only looked at ends no run
        return [decode(tokenizer, [token]) for token in ids]
    return [piece.removeprefix(_CONTROL).decode(errors="backslashreplace") for piece in spelt]


def _found(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int], *, alone: bool
) -> list[bytes]:
    table = piece_table(tokenizer, ids)
    tail = [token for token in before[-_TAIL:] if table.is_text(token)]
    own = [token for token in ids if table.is_text(token)]
    following = iter(_verified(tokenizer, table, tail, own, alone=alone))
    return [next(following) if table.is_text(token) else table.control_piece(token) for token in ids]


def _verified(
    tokenizer: PreTrainedTokenizerBase, table: PieceTable, tail: list[int], own: list[int], *, alone: bool
) -> list[bytes]:
    """The bytes of text tokens behind others, checked against what the tokenizer decodes both to."""
    both = [*tail, *own]
    text = decode(tokenizer, both) if both else ""
    for spelling in table.spellings:
        spelt = table.spell(both, spelling)
        dropped = _dropped(_shown(table, both, spelt, spelling), text, spelling)
        if dropped is not None:
            return _without_blanks(spelt, dropped) if alone else spelt[len(tail) :]
    return _by_decoding(tokenizer, both, text)[len(tail) :]


def _fits_probes(tokenizer: PreTrainedTokenizerBase, table: PieceTable, spelling: str) -> bool:
    for probe in PROBES:
        ids = [token for token in encoded(tokenizer, probe) or [] if table.is_text(token)]
        text = decode(tokenizer, ids) if ids else ""
        if _dropped(_shown(table, ids, table.spell(ids, spelling), spelling), text, spelling) is None:
            return False
    return True


def _by_decoding(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[bytes]:
    """The bytes of text tokens, found by decoding one token more at a time.

    Args:
        tokenizer: Their tokenizer.
        ids: Ids of text tokens.
        text: What all of them decode to.

    Raises:
        SignalError: The parts do not make the whole.
    """
    found = [b""] * len(ids)
    window = done = 0  # decoded so far: ids[window:done], whose text the next ids continue
    joined = ""
    for index in range(len(ids)):
        known, longer = decode(tokenizer, ids[window:done]), decode(tokenizer, ids[window : index + 1])
        if longer.startswith(known) and len(longer) > len(known) and not longer.endswith("\ufffd"):
            found[index] = longer[len(known) :].encode()
            joined += longer[len(known) :]
            window, done = done, index + 1
    rest = text[len(joined) :]
    whole = rest.rstrip("\ufffd")
    if not text.startswith(joined) or (rest and done == len(ids)):
        raise SignalError(
            f"the tokenizer{_named(tokenizer)} decodes {len(ids)} tokens to {text[:40]!r}..., and one after another to "
            f"{joined[:40]!r}...; the bytes of its tokens are not known, so it cannot be aligned with another tokenizer"
        )
    if rest:
        found[-1] = whole.encode() + _PART * (len(rest) - len(whole))
    return found


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _spelt(token: str, spelling: str) -> bytes:
    if spelling == "bytes":
        known = _bytes_of_characters()
        return bytes(known[one] for one in token) if all(one in known for one in token) else token.encode()
    single = _SINGLE.fullmatch(token) if spelling == "fallback" else None
    return bytes([int(single[1], 16)]) if single else token.replace(_BLANK, " ").encode()


def _shown(table: PieceTable, ids: Sequence[int], spelt: Sequence[bytes], spelling: str) -> str:
    """What a tokenizer shows for these bytes: a run of single bytes that is no text is one mark for each byte."""
    if spelling != "fallback":
        return b"".join(spelt).decode(errors="replace")
    text, run = "", b""
    for token, piece in zip(ids, spelt, strict=True):
        if table.is_single(token, spelling):
            run += piece
            continue
        text += _run_shown(run) + piece.decode()
        run = b""
    return text + _run_shown(run)


def _run_shown(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _dropped(shown: str, text: str, spelling: str) -> int | None:
    """The number of blanks that a tokenizer drops at the beginning; None if the two are different texts."""
    if shown == text:
        return 0
    same = spelling != "bytes" and shown.lstrip(" ") == text.lstrip(" ") and len(shown) > len(text)
    return len(shown) - len(text) if same else None


def _without_blanks(spelt: list[bytes], dropped: int) -> list[bytes]:
    found: list[bytes] = []
    for piece in spelt:
        blanks = min(dropped, len(piece) - len(piece.lstrip(b" ")))
        found.append(piece[blanks:])
        dropped -= blanks
    return found


def _spellings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The ways in which this tokenizer's tokens may spell bytes; none if it is only known by decoding."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ["bytes", "fallback", "blank"]
    decoder = "" if backend.decoder is None else bytes(backend.decoder.__getstate__()).decode()
    if '"ByteLevel"' in decoder:
        return ["bytes"]
    if _BLANK not in decoder:
        return []
    return ["fallback" if '"ByteFallback"' in decoder else "blank"]


def unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token for text that the tokenizer cannot encode; None where it has none of its own."""
    found: object = tokenizer.unk_token_id
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return None if found is None or found in ends else int(found)  # pyright: ignore[reportArgumentType]


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
