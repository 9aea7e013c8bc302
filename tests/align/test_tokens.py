from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retort.align import check_same_tokenizer
from retort.errors import UserError


def words(vocab: dict[str, int], *, unknown: str | None = "?", **special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(vocab, unk_token=unknown) if unknown else models.WordLevel(vocab))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def byte_pairs(merges: list[tuple[str, str]], *extra: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Th", "he", "The"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    return tokenizer


BASE = {"?": 0, "a": 1, "b": 2, "c": 3}


def refused(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> str:
    with pytest.raises(UserError) as caught:
        check_same_tokenizer(student, teacher)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("Use a teacher of the student's family, or a method for two tokenizers")
    return str(caught.value)


def test_the_same_tokenizer_shares_every_id() -> None:
    assert check_same_tokenizer(words(BASE), words(BASE)) == 4
    assert check_same_tokenizer(byte_pairs([("T", "h")]), byte_pairs([("T", "h")])) == 259


def test_more_tokens_at_the_end_of_one_side_are_fine() -> None:
    assert check_same_tokenizer(words(BASE), words(BASE, eos_token="<eos>")) == 4
    assert check_same_tokenizer(words({**BASE, "d": 4, "e": 5}), words(BASE)) == 4
    assert check_same_tokenizer(byte_pairs([], "<end>"), byte_pairs([], "<end>", "<think>", "</think>")) == 260


def test_ids_that_one_side_leaves_unused_are_fine() -> None:
    padded = {**BASE, "x": 10}
    filled = {**BASE, "filler": 5, "x": 10, "y": 11}
    assert check_same_tokenizer(words(padded), words(filled)) == 11
    assert check_same_tokenizer(words(filled), words(padded)) == 11


def test_disagreeing_ids_are_counted_and_the_first_three_named() -> None:
    message = refused(words({**BASE, "d": 4, "e": 5}), words({"?": 0, "b": 1, "a": 2, "c": 3, "e": 4, "d": 5}))
    assert "4 of 6 ids disagree" in message
    assert "id 1 is 'a' for the student, 'b' for the teacher; id 2 is 'b'" in message
    assert "id 4 is 'd' for the student, 'e' for the teacher" in message
    assert "id 5" not in message


def test_a_token_at_another_id_disagrees_even_where_the_first_id_is_unused() -> None:
    message = refused(words({**BASE, "end": 4, "z": 9}), words({**BASE, "end": 5, "z": 9}))
    assert "id 4 is 'end' for the student, None for the teacher" in message


def test_one_vocabulary_that_cuts_differently() -> None:
    message = refused(byte_pairs([("T", "h"), ("Th", "e")]), byte_pairs([]))
    assert "cut text differently" in message
    assert "'The quick" in message


def test_normalisers_are_noticed() -> None:
    from tokenizers import normalizers

    ours, theirs = byte_pairs([]), byte_pairs([])
    theirs.backend_tokenizer.normalizer = normalizers.NFC()
    assert "cut text differently" in refused(ours, theirs)


def test_vocabularies_that_cannot_write_the_probes() -> None:
    assert check_same_tokenizer(words(BASE, unknown=None), words(BASE, unknown=None)) == 4
    assert "not encodable" in refused(words(BASE, unknown=None), words(BASE))


def test_a_large_vocabulary() -> None:
    vocab = {f"w{i}": i for i in range(152_000)}
    other = {**vocab, "w7": 9, "w9": 7}
    ours, same, theirs = (words(v, unknown="w0") for v in (vocab, dict(vocab), other))
    assert check_same_tokenizer(ours, same) == 152_000
    assert "2 of 152000 ids disagree" in refused(ours, theirs)
