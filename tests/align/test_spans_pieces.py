"""The bytes of tokens, and a text in another tokenizer's tokens: every kind of tokenizer, any ids, any text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from trained import KINDS, REVERSIBLE, Letters, slow, trained
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from retort.align.pieces import STOP, inner_pieces, piece_table, pieces
from retort.align.retokenize import retokenize
from retort.align.shared import shared
from retort.align.stops import StopTokens
from retort.align.text import control_tokens, decode
from retort.errors import SignalError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FRAGMENTS = [
    *("the", " fox", "Fox", " ", "  ", "\n", "\r\n", "\t", "is", "123", "3.14", "é", "e\u0301", "ﬁ", "Å", "\u00a0"),
    *(
        "你好",
        "नमस्ते",
        "مرحبا",
        "🙂",
        "👩\u200d🔬",
        "<0x41>",
        "<think>",
        "</s>",
        "<unk>",
        "<end>",
        "▁",
        "Ġ",
        "##s",
        "\x00",
    ),
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=8).map("".join)
NUMBERS = st.lists(st.integers(0, 10**6), max_size=12)


def any_ids(tokenizer: Any, numbers: list[int]) -> list[int]:
    known = sorted(tokenizer.get_vocab().values())
    return [known[number % len(known)] for number in numbers]


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(NUMBERS, NUMBERS)
def test_pieces_are_the_bytes_of_what_the_tokenizer_decodes(kind: str, prompt: list[int], numbers: list[int]) -> None:
    """Ids as a model may sample them: characters cut anywhere, control tokens inside."""
    tokenizer = trained(kind)
    before, ids = any_ids(tokenizer, prompt), any_ids(tokenizer, numbers)
    control = set(control_tokens(tokenizer).values())
    found = pieces(tokenizer, ids, before)
    assert len(found) == len(ids)
    assert [piece[:1] == b"\xff" and len(piece) > 1 for piece in found] == [token in control for token in ids]
    alone = pieces(tokenizer, ids)
    spelt = b"".join(piece for token, piece in zip(ids, alone, strict=True) if token not in control)
    shown = decode(tokenizer, [token for token in ids if token not in control])
    try:
        assert spelt.decode() == shown
    except UnicodeDecodeError:
        assert "\ufffd" in shown
    # A prompt before them changes nothing but a blank at their beginning.
    behind = b"".join(piece for token, piece in zip(ids, found, strict=True) if token not in control)
    assert behind.lstrip(b" ") == spelt.lstrip(b" ") or kind == "bert"


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(TEXTS)
def test_a_text_is_tiled_by_its_tokens(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    found = retokenize(tokenizer, text)
    assert b"".join(found.pieces) == (text.encode() if found.ids else b"")
    assert len(found.ids) == len(found.pieces) == len(found.rewritten) == len(found.unknown)
    own = inner_pieces(tokenizer, found.ids)
    changed = [piece != spelling for piece, spelling in zip(found.pieces, own, strict=True)]
    assert found.rewritten == changed
    control = set(control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    assert not control & set(found.ids)
    # A mark for a blank, written as text, is a blank to these tokenizers.
    # Some put a blank of their own behind an added word, too.
    odd = ("▁", "<unk>", "<0x") if kind == "gemma" else ("▁", "<unk>", "<0x", "<think>")
    if kind in REVERSIBLE and not any(one in text for one in odd):
        assert not any(found.rewritten) and not any(found.unknown)


def test_a_text_that_is_normalised_stands_where_it_stood() -> None:
    """Nothing shifts to a neighbour: a mark stays with its letter, a ligature is one."""
    qwen = retokenize(trained("qwen"), "e\u0301 x")
    assert qwen.pieces == [b"", "e\u0301".encode(), b" ", b"x"] and qwen.rewritten == [True, True, False, False]
    assert retokenize(trained("t5"), "ﬁ x").pieces[:2] == [b"", "ﬁ".encode()]
    bert = retokenize(trained("bert"), "The  FOX e\u0301.")
    assert bert.pieces == [b"The", b"  FOX", " e\u0301".encode(), b"."]
    assert bert.rewritten == [True, True, True, False]
    assert retokenize(trained("t5"), "the Q").unknown[-1] is True


def test_a_blank_of_sentencepiece_is_there_where_the_model_put_one() -> None:
    for kind in ("llama", "unigram", "t5"):
        tokenizer = trained(kind)
        with_blank, without = retokenize(tokenizer, " the fox"), retokenize(tokenizer, "the fox")
        assert b"".join(with_blank.pieces) == b" the fox" and not any(with_blank.rewritten)
        assert b"".join(without.pieces) == b"the fox" and not any(without.rewritten)
        begun = tokenizer.encode("the fox", add_special_tokens=False)
        # Behind a prompt the mark is a blank; at the beginning of a text the tokenizer drops it.
        assert b"".join(pieces(tokenizer, begun, before=[5])) == b" the fox"
        assert b"".join(pieces(tokenizer, begun)) == b"the fox"


def test_a_blank_that_a_tokenizer_puts_behind_an_added_word_stands_for_nothing() -> None:
    found = retokenize(trained("unigram"), "<think>the")
    assert found.pieces[:2] == [b"<think>", b""] and found.rewritten[:3] == [False, True, False]


def test_parts_of_characters_and_single_bytes() -> None:
    tokenizer = trained("gemma")
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in "你".encode()]
    assert pieces(tokenizer, ids) == [b"\xe4", b"\xbd", b"\xa0"]
    assert pieces(tokenizer, [*ids[:2], vocabulary["e"], ids[0]]) == [b"\xe4", b"\xbd", b"e", b"\xe4"]


def test_control_tokens_and_ids_without_a_token_have_pieces_that_no_text_contains() -> None:
    tokenizer = trained("byte-level")
    stop, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")
    found = pieces(tokenizer, [end, stop, 9999], stops=[stop])
    assert found == [b"\xff<end>", STOP, b"\xff#9999"]
    assert all(piece not in "any text ÿ".encode() for piece in found)


def test_a_word_that_is_added_is_text() -> None:
    think = trained("gemma").convert_tokens_to_ids("<think>")
    assert pieces(trained("gemma"), [think]) == [b"<think>"]


def test_the_table_follows_a_tokenizer_that_grows() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained("byte-level").backend_tokenizer.to_str())
    )
    assert pieces(tokenizer, [len(tokenizer)]) == [b"\xff#%d" % len(tokenizer)]
    tokenizer.add_tokens(["<new>"])
    assert pieces(tokenizer, [len(tokenizer) - 1]) == [b"<new>"]
    assert piece_table(tokenizer) is piece_table(tokenizer)


@pytest.mark.parametrize("tokenizer", slow(), ids=["letters", "byt5"])
def test_slow_tokenizers(tokenizer: Any) -> None:
    ids = tokenizer.encode("a fox, the fox.", add_special_tokens=False)
    assert pieces(tokenizer, ids) == [one.encode() for one in "a fox, the fox."]
    assert retokenize(tokenizer, "the fox").ids == tokenizer.encode("the fox", add_special_tokens=False)


def test_a_character_of_which_only_the_whole_is_known_belongs_to_its_last_token() -> None:
    byt5 = ByT5Tokenizer()
    # At the end nobody says which bytes are there, so none that could be text.
    assert pieces(byt5, byt5.encode("aé", add_special_tokens=False)[:2]) == [b"a", b""]
    assert pieces(byt5, byt5.encode("é!", add_special_tokens=False)) == [b"", "é".encode(), b"!"]


def test_a_slow_tokenizer_that_normalises_is_refused() -> None:
    with pytest.raises(SignalError, match=r"encodes 'Fox' to tokens that spell another text, and gives no offsets"):
        retokenize(Letters(), "Fox")


def test_a_text_that_cannot_be_encoded_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="?")))
    with pytest.raises(SignalError, match="cannot encode 'b', so its model cannot read it: "):
        retokenize(tokenizer, "b")


def test_a_decoder_that_does_not_add_up_is_refused() -> None:
    class Sorted(Letters):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(sorted(tokens))

    with pytest.raises(
        SignalError, match="decodes 2 tokens to 'ab'..., and one after another to 'b'...; .* are not known"
    ):
        pieces(Sorted(), Sorted().encode("ba"))


def test_a_beginning_that_a_tokenizer_adds_unasked_is_taken_off() -> None:
    class Begins(PreTrainedTokenizerFast):
        def encode(self, text: Any, *rest: Any, **settings: Any) -> list[int]:
            return [self.bos_token_id, *super().encode(text, *rest, **settings), self.eos_token_id]

    inner = Tokenizer.from_str(trained("llama").backend_tokenizer.to_str())
    tokenizer = Begins(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert retokenize(tokenizer, "the fox") == retokenize(trained("llama"), "the fox")
    # One that its post-processor adds comes with special tokens only, which are not asked for.
    inner = Tokenizer.from_str(trained("byte-level").backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert retokenize(tokenizer, "the fox") == retokenize(trained("byte-level"), "the fox")


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_that_is_spelt_is_text(kind: str) -> None:
    found = retokenize(trained(kind), "fox</s>fox")
    assert b"".join(found.pieces) == b"fox</s>fox"
    assert trained(kind).eos_token_id not in found.ids


def test_a_control_token_that_the_tokenizer_always_makes_is_cut() -> None:
    """Where `split_special_tokens` has no effect."""

    class Always(PreTrainedTokenizerFast):
        def encode(self, text: Any, *rest: Any, **settings: Any) -> list[int]:
            return super().encode(text, *rest, **settings | {"split_special_tokens": False})

    inner = Tokenizer.from_str(trained("byte-level").backend_tokenizer.to_str())
    tokenizer = Always(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = retokenize(tokenizer, "fox</s>fox")
    assert b"".join(found.pieces) == b"fox</s>fox" and tokenizer.eos_token_id not in found.ids
    assert b"<" in found.pieces  # behind which it was cut


def test_shared_ids_spell_the_same_bytes() -> None:
    for one in KINDS:
        for other in KINDS:
            ours, theirs = trained(one, "one"), trained(other, "other")
            stops = StopTokens(frozenset({ours.eos_token_id}), ours.eos_token_id)
            others = StopTokens(frozenset({theirs.eos_token_id}), theirs.eos_token_id)
            found = shared(ours, theirs, stops, others)
            student_K, teacher_K = found
            assert (int(student_K[-1]), int(teacher_K[-1])) == (stops.primary, others.primary)
            assert len(set(student_K.tolist())) == len(set(teacher_K.tolist())) == len(found)
            if "bert" not in (one, other):
                spelt = inner_pieces(ours, student_K.tolist()[:-1])
                assert spelt == inner_pieces(theirs, teacher_K.tolist()[:-1])
                assert (
                    b"e" in spelt
                    and b"" not in spelt
                    and not any(piece[:1] == b"\xff" and len(piece) > 1 for piece in spelt)
                )
            assert found.student_lacking == len(ours) - len(found) > 0
            assert found.teacher_lacking == len(theirs) - len(found) > 0


def test_shared_ids_of_a_tokenizer_and_itself_are_all_but_control_tokens() -> None:
    for kind in ("byte-level", "t5"):
        tokenizer = trained(kind)
        ours, theirs = shared(tokenizer, tokenizer)
        text = set(tokenizer.get_vocab().values()) - set(control_tokens(tokenizer).values())
        assert ours.tolist() == theirs.tolist() == sorted(text)


def test_two_ids_for_one_string() -> None:
    """A token for a single byte gives way to a word; two words for the same bytes are left out."""
    gemma = trained("gemma")
    ours, _ = shared(gemma, trained("byte-level"))
    vocabulary = gemma.get_vocab()
    assert vocabulary["e"] in ours.tolist() and vocabulary["<0x65>"] not in ours.tolist()
    assert vocabulary["<0xE4>"] in ours.tolist()  # no word is this byte

    inner = Tokenizer(models.WordLevel({"▁e": 0, " e": 1, "a": 2, "<s>": 3}, unk_token="a"))
    inner.decoder = decoders.Replace("▁", " ")
    twice = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>")
    found = shared(twice, gemma)
    assert found.student_K.tolist() == [2]
    assert found.ambiguous == (1 if "▁e" in vocabulary else 0)
