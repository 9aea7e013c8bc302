"""A student's sequence as a teacher with another tokenizer reads it: any ids, every pair of kinds, and bad input."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trained import KINDS, Letters, trained

from retort.align.aligned import AlignedTurns
from retort.align.pieces import inner_pieces, piece_table, pieces
from retort.align.reread import TeacherText
from retort.align.retokenize import retokenize
from retort.align.stops import StopTokens
from retort.core.sequences import Media, TokenSequence
from retort.errors import SignalError

PROPERTY = settings(max_examples=4, deadline=None, derandomize=True)
PAIRS = [(one, other) for one in KINDS for other in KINDS]
TURNS = st.lists(st.lists(st.integers(0, 10**6), max_size=10), min_size=1, max_size=3)


def stops(tokenizer: Any, *names: str) -> StopTokens:
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names or ("</s>",)]
    return StopTokens(frozenset(ids), ids[0])


def teacher_text(student: Any, teacher: Any, **settings: Any) -> TeacherText:
    return TeacherText(student, teacher, stops(student), stops(teacher), **settings)


def of(student: Any, *turns: str | list[int], stop: bool = True) -> TokenSequence:
    """A sequence of a student's: a prompt, and turns of texts or ids with something read between them."""
    found = TokenSequence.of([student.convert_tokens_to_ids("e")])
    for turn in turns:
        ids = retokenize(student, turn).ids if isinstance(turn, str) else turn
        found = found.then([*ids, student.eos_token_id] if stop else ids, decided=True).then([student.bos_token_id])
    return found.part(0, len(found) - 1)


def spelt(tokenizer: Any, sequence: TokenSequence) -> list[bytes]:
    """The bytes of decided tokens, those of control tokens left out."""
    found: list[bytes] = []
    before: list[int] = []
    for run in sequence.pieces():
        ids = run.tokens_L.tolist()
        if bool(run.action_mask_L[0]):
            found += [b"" if p[:1] == b"\xff" and len(p) > 1 else p for p in pieces(tokenizer, ids, before)]
        before += ids
    return found


def by_unit(pieces: list[bytes], unit: torch.Tensor) -> list[bytes]:
    found = [b""] * (int(unit.max()) + 1 if len(unit) else 0)
    for piece, own in zip(pieces, unit.tolist(), strict=True):
        if own >= 0:
            found[own] += piece
    return found


def check(student: Any, teacher: Any, sequence: TokenSequence, found: AlignedTurns) -> None:
    """What holds for every alignment."""
    ours, theirs = spelt(student, sequence), inner_pieces(teacher, found.sequence.actions_A.tolist())
    assert len(found.unit_A) == sequence.steps and len(found.unit_B) == found.sequence.steps
    for unit in (found.unit_A, found.unit_B):  # numbered in order, without gaps, neighbours together
        real = unit[unit >= 0]
        assert torch.equal(real, real.sort().values)
        assert torch.equal(real.unique(), torch.arange(len(found.student_U)))
    assert found.student_U.shape == found.teacher_U.shape
    coverage = found.coverage
    assert coverage.bytes == sum(map(len, ours))
    single = by_unit(ours, found.unit_A)
    assert coverage.single == sum(len(p) for p, one in zip(single, found.single_U.tolist(), strict=True) if one)
    assert coverage.spans == sum(map(len, single)) - coverage.single
    assert sum(coverage.lengths.values()) == len(found.student_U)
    if not coverage.rewritten and piece_table(teacher).spellings:
        control = [b"" if p[:1] == b"\xff" and len(p) > 1 else p for p in theirs]
        assert by_unit(control, found.unit_B) == single


@pytest.mark.parametrize(("one", "other"), PAIRS)
@PROPERTY
@given(TURNS)
def test_any_ids_of_any_pair(one: str, other: str, turns: list[list[int]]) -> None:
    student, teacher = trained(one, "mine"), trained(other, "yours")
    known = sorted(student.get_vocab().values())
    sequence = of(student, *([known[n % len(known)] for n in turn] for turn in turns))
    contexts = [[teacher.bos_token_id, 5], *[[7]] * (len(turns) - 1)]
    found = teacher_text(student, teacher).read(sequence, contexts)
    check(student, teacher, sequence, found)
    assert found.coverage.controls >= len(turns)
    # Every turn of the teacher's ends with its own stop, behind which its next context begins.
    runs = [run.tokens_L.tolist() for run in found.sequence.pieces()]
    assert runs[::2] == contexts and all(run[-1] == teacher.eos_token_id for run in runs[1::2])


@pytest.mark.parametrize(("one", "other"), [(a, b) for a, b in PAIRS if "bert" not in (a, b)])
def test_boundaries_are_those_that_both_have(one: str, other: str) -> None:
    student, teacher = trained(one), trained(other)
    text = "the answer is 3.14, the fox"
    found = teacher_text(student, teacher).read(of(student, text, stop=False), [[5]])
    ours, theirs = retokenize(student, text).pieces, retokenize(teacher, text).pieces
    common = set(accumulate(map(len, ours))) & set(accumulate(map(len, theirs)))
    assert set(accumulate(map(len, by_unit(ours, found.unit_A)))) == common
    assert found.coverage.bytes == len(text) and not found.coverage.lost


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokenizers_are_one_to_one(kind: str) -> None:
    tokenizer = trained(kind)
    # A student's token for unknown text is never read, so these two have none.
    second = "the answer is" if kind in ("t5", "bert") else "é 你好\n"
    sequence = of(tokenizer, "the fox is 3, the answer", second)
    found = teacher_text(tokenizer, tokenizer).read(sequence, [[5], [6]])
    assert torch.equal(found.sequence.actions_A, sequence.actions_A)
    assert torch.equal(found.unit_A, torch.arange(sequence.steps)) and torch.equal(found.unit_B, found.unit_A)


def test_three_turns_by_hand() -> None:
    student, teacher = trained("bytes"), trained("byte-level")
    sequence = of(student, " the", "é", " fox!")
    found = teacher_text(student, teacher).read(sequence, [[5, 6], [7], [8, 9]])
    the, fox, stop = (teacher.convert_tokens_to_ids(token) for token in ("Ġthe", "Ġfox", "</s>"))
    c3, a9, mark = (teacher.convert_tokens_to_ids(token) for token in ("Ã", "©", "!"))
    assert found.sequence.tokens_L.tolist() == [5, 6, the, stop, 7, c3, a9, stop, 8, 9, fox, mark, stop]
    assert found.sequence.action_mask_L.int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert found.unit_A.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7]
    assert found.unit_B.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found.student_U.tolist() == [4, 1, 1, 1, 1, 4, 1, 1] and found.teacher_U.tolist() == [1] * 8
    assert found.single_U.tolist() == [False, True, True, True, True, False, True, True]
    coverage = found.coverage
    assert (coverage.single, coverage.spans, coverage.controls, coverage.controls_lost) == (3, 8, 3, 0)
    assert coverage.lengths == {(4, 1): 2, (1, 1): 6} and not coverage.lost
    assert (coverage + coverage).lengths == {(4, 1): 4, (1, 1): 12} and (coverage + coverage).bytes == 22
    # Sums over units, as a loss takes them.
    logp_A = torch.arange(14.0)
    assert torch.zeros(8).index_add_(0, found.unit_A, logp_A).tolist() == [6, 4, 5, 6, 7, 38, 12, 13]


def test_anchor_segments_end_at_a_match_and_the_stop_is_one() -> None:
    student, teacher = trained("bytes"), trained("byte-level")
    sequence = of(student, " the fox! the", stop=False)
    found = teacher_text(student, teacher, mode="anchor").read(sequence, [[5]])
    assert found.unit_A.tolist() == [0] * 9 + [-1] * 4 and found.unit_B.tolist() == [0, 0, 0, -1]
    assert found.coverage.lost == {"unanchored": 4}
    found = teacher_text(student, teacher, mode="anchor").read(of(student, " the fox! the", " fox"), [[5], [6]])
    assert found.coverage.lengths == {(9, 3): 1, (5, 2): 2}


def test_control_tokens_are_read_by_set_and_by_name() -> None:
    student, teacher = trained("bytes", "mine"), trained("byte-level", "yours")
    mine, end, unknown = (student.convert_tokens_to_ids(name) for name in ("<mine>", "<end>", "<unk>"))
    e = student.convert_tokens_to_ids("e")
    sequence = TokenSequence.of([e]).then([e, mine, e, end, e, unknown, student.eos_token_id], decided=True)
    found = teacher_text(student, teacher).read(sequence, [[5]])
    theirs = [teacher.convert_tokens_to_ids(token) for token in ("e", "e", "<end>", "e", "</s>")]
    assert found.sequence.actions_A.tolist() == theirs
    assert found.unit_A.tolist() == [0, -1, 1, 2, 3, -1, 4]
    assert (found.coverage.controls, found.coverage.controls_lost, found.coverage.bytes) == (2, 2, 3)
    # Any stop of the student's is one of the teacher's: the one of its name, else the primary one.
    text = TeacherText(student, teacher, stops(student, "</s>", "<end>", "<mine>"), stops(teacher, "<s>", "<end>"))
    for name, expected in (("</s>", "<s>"), ("<end>", "<end>"), ("<mine>", "<s>")):
        ended = TokenSequence.of([e]).then([e, student.convert_tokens_to_ids(name)], decided=True)
        assert text.read(ended, [[5]]).sequence.tokens_L.tolist()[-1] == teacher.convert_tokens_to_ids(expected)
    # What does not end the student's turn does not end the teacher's.
    text = TeacherText(student, teacher, stops(student), stops(teacher, "</s>", "<end>"))
    found = text.read(TokenSequence.of([e]).then([end, e], decided=True), [[5]])
    assert found.unit_A.tolist() == [-1, 0] and found.coverage.controls_lost == 1


def test_a_word_that_is_added_is_the_teachers_control_token_of_that_name() -> None:
    student, teacher = trained("byte-level"), trained("gemma", "think2")
    teacher.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    made = trained("bytes", "other")
    made.add_tokens(["<|x|>"])
    for own, expected in ((made, 1), (student, 0)):
        found = teacher_text(own, teacher).read(of(own, "a<|x|>b"), [[5]])
        read = found.sequence.actions_A.tolist()
        assert read.count(teacher.convert_tokens_to_ids("<|x|>")) == expected
        assert found.coverage.controls == 1 + expected and not found.coverage.lost


def test_a_completion_that_is_cut_inside_a_character() -> None:
    student, teacher = trained("bytes"), trained("gemma")
    ids = retokenize(student, "e你").ids
    found = teacher_text(student, teacher).read(of(student, ids[:-1], stop=False), [[5]])
    assert found.unit_A.tolist() == [0, -1, -1] and found.coverage.lost == {"invalid": 2}
    assert found.sequence.actions_A.tolist() == [teacher.convert_tokens_to_ids("e")]
    # Inside: what is no UTF-8 is left out, and what follows is a text of its own.
    found = teacher_text(student, teacher).read(of(student, [*ids[:-1], *ids]), [[5]])
    assert found.unit_A.tolist() == [0, -1, -1, 1, 2, 3, 4, 5] and found.coverage.lost == {"invalid": 2}


def test_a_token_with_a_character_and_a_part_of_one_is_in_no_unit() -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"a": 0, "Ã": 1, "aÃ": 2, "©": 3, "©a": 4, "e": 5}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    student = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    teacher = trained("bytes")
    sequence = of(student, [0, 2, 0, 0, 1, 4, 0, 4, 5, 1])
    found = teacher_text(student, teacher).read(sequence, [[5]])
    # a | aÃ (cut) | a | a | Ã | ©a (the teacher's Ã, and © with a) | a | ©a (no beginning) | e | Ã (no end) | stop
    assert found.unit_A.tolist() == [0, -1, 1, 2, 3, 4, 5, -1, 6, -1, 7]
    assert found.coverage.lost == {"invalid": 5}
    check(student, teacher, sequence, found)


def test_nothing_and_a_stop_alone() -> None:
    student, teacher = trained("bytes"), trained("unigram")
    found = teacher_text(student, teacher).read(of(student, []), [[5]])
    assert found.unit_A.tolist() == found.unit_B.tolist() == [0] and found.coverage.bytes == 0
    found = teacher_text(student, teacher).read(TokenSequence.of([3, 4]), [[5]])
    assert found.sequence.tokens_L.tolist() == [5] and len(found.unit_A) == len(found.unit_B) == 0
    assert len(found.student_U) == 0


def test_what_a_teacher_drops_or_does_not_know_is_counted() -> None:
    student, bert, t5 = trained("bytes"), trained("bert"), trained("t5")
    found = teacher_text(student, bert).read(of(student, "\x00\x01"), [[5]])
    assert found.coverage.lost == {"unread": 2} and found.unit_A.tolist() == [-1, -1, 0]
    found = teacher_text(student, t5).read(of(student, "the 🙂 fox"), [[5]])
    assert found.coverage.lost == {"unknown": 4} and found.coverage.bytes == 12
    normalised = teacher_text(student, trained("qwen")).read(of(student, "e\u0301 e"), [[5]])
    assert normalised.coverage.rewritten == 2 and not normalised.coverage.lost


def test_a_teacher_with_a_short_context() -> None:
    student, teacher = trained("byte-level"), trained("bytes")
    sequence = of(student, "the fox", "the fox")
    whole = teacher_text(student, teacher).read(sequence, [[5, 6], [7]])
    for longest in range(3, len(whole.sequence) + 1):
        found = teacher_text(student, teacher, longest=longest).read(sequence, [[5, 6], [7]])
        assert found.sequence.tokens_L.tolist() == whole.sequence.tokens_L.tolist()[:longest]
        kept = int(found.unit_A.max()) + 1
        assert torch.equal(found.unit_A, torch.where(whole.unit_A < kept, whole.unit_A, -1))
        assert (
            found.coverage.lost.get("beyond", 0) == whole.coverage.bytes - found.coverage.single - found.coverage.spans
        )
        check(student, teacher, sequence, found)
    with pytest.raises(SignalError, match="the prompt has 2 tokens for the teacher, whose context holds 2"):
        teacher_text(student, teacher, longest=2).read(sequence, [[5, 6], [7]])


def test_other_contexts_than_the_sequence_has() -> None:
    student, teacher = trained("bytes"), trained("byte-level")
    text = teacher_text(student, teacher)
    with pytest.raises(SignalError, match="with 2 stretches of prompt and replies .* that has 1 of its own"):
        text.read(of(student, "a", "b"), [[5]])
    with pytest.raises(SignalError, match="the teacher's rendering of the prompt has no tokens"):
        text.read(of(student, "a"), [[]])
    with pytest.raises(SignalError, match="images or sounds"):
        text.read(TokenSequence.of([5, 6], (Media("x", 0),)).then([7], decided=True), [[5]])
    with pytest.raises(SignalError, match="encodes 'Fox' to tokens that spell another text"):
        letters = Letters()
        TeacherText(student, letters, stops(student), stops(letters)).read(of(student, "Fox"), [[5]])
