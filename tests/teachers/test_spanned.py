"""A teacher with another tokenizer: its numbers are those of plain passes over whole sequences, summed by bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import make_model_of

from retort.align.pair import SameIds
from retort.align.pieces import pieces
from retort.align.retokenize import retokenize
from retort.align.spanned import SpanPair, Unspelt, align_spans
from retort.core.needs import DENSE, SAMPLED, SPANS
from retort.core.rollouts import Group, Message, Outcome, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense, Spans
from retort.errors import SignalError, UserError
from retort.models.load import load_model
from retort.teachers import spanned
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher
from retort.teachers.view import View
from retort.teachers.views import privileged

PAIRS = [
    ("byte-level", "unigram"),
    ("unigram", "byte-level"),
    ("llama", "gemma"),
    ("gemma", "bert"),
    ("bytes", "qwen"),
    ("t5", "llama"),
]
TEXT = "the fox doesn't jump"


def loaded(folder: Path, kind: str, seed: int, stop: str | None = None) -> Any:
    """A model of random weights in float64 with a tokenizer of a kind."""
    make_model_of(folder, kind, seed=seed)
    settings: dict[str, Any] = {"precision": "fp32", "device": torch.device("cpu"), "stop": [stop] if stop else None}
    found = load_model(str(folder), role="teacher", **settings)
    found.model.double()
    return found


@dataclass(frozen=True)
class Made:
    """A student, a teacher that is aligned with it, and rollouts."""

    student: Any
    teacher: SpanTeacher

    @property
    def pair(self) -> SpanPair:
        return self.teacher.pair

    def rollout(self, ids: Sequence[int], asked: str = TEXT, **privileged: str) -> Rollout:
        before = self.student.tokenizer(asked, add_special_tokens=False)["input_ids"]
        prompt = Prompt(asked, (Message("user", asked),), privileged=privileged)
        return Rollout(prompt, TokenSequence.of(before).then(list(ids), decided=True), member=0)

    def spelt(self, text: str, *, stop: bool = True) -> list[int]:
        ids = retokenize(self.student.tokenizer, text).ids
        return [*ids, self.student.stops.primary] if stop else ids

    def batch(self) -> list[Group]:
        """Texts that end and that do not, the stop alone, and one that is cut inside a character if it can be."""
        cut = self.spelt("the answer ł", stop=False)
        last = pieces(self.student.tokenizer, cut)[-1]
        cut = cut[:-1] if len(last) < 2 and last.hex() >= "80" else cut
        found = [
            self.rollout(self.spelt(" lazy dog; it's 3:45 p.m.")),
            self.rollout([self.student.stops.primary], "hello"),
            self.rollout(cut, "a b c"),
            self.rollout(self.spelt("return x\n\n    if a", stop=False), "def f(x):"),
        ]
        return in_groups(found)

    def score(self, groups: list[Group], *, view: View | None = None, temperature: float = 1.0) -> Spans:
        said = self.teacher.score(groups, ScoreRequest(view or View(), frozenset({SPANS, SAMPLED}), temperature))
        assert isinstance(said, Spans)
        return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Makes a pair, once for each set of arguments."""
    lms: dict[tuple[Any, ...], Any] = {}

    def lm(kind: str, seed: int, stop: str | None) -> Any:
        if (kind, seed, stop) not in lms:
            lms[kind, seed, stop] = loaded(tmp_path_factory.mktemp("model"), kind, seed, stop)
        return lms[kind, seed, stop]

    def make(student: str, teacher: str, stop: str | None = None) -> Made:
        ours, theirs = lm(student, 1, None), lm(teacher, 2, stop)
        return Made(ours, SpanTeacher(theirs, alignment=align_spans(ours, theirs, "it"), batch_tokens=32))

    return make


@dataclass(frozen=True)
class Unit:
    """A unit of one rollout: tokens of both, with the teacher's logits before each of its own and its log-probs."""

    own: list[int]
    theirs: list[int]
    logits_IV: Tensor
    logp: float
    raw: float


def slowly(made: Made, rollout: Rollout, prompt_ids: list[int], temperature: float = 1.0) -> list[Unit]:
    """One pass over the whole sequence; a unit ends where both sides have a boundary."""
    ids: list[int] = rollout.sequence.actions_A.tolist()
    ends_itself = bool(ids) and ids[-1] == made.student.stops.primary
    before: list[int] = rollout.sequence.prefix.tokens_L.tolist()
    spelt = pieces(made.student.tokenizer, ids[:-1] if ends_itself else ids, before)
    data = b"".join(spelt)
    text = data.decode(errors="ignore")  # what is cut off is at the end
    theirs = retokenize(made.teacher.lm.tokenizer, text)
    sides = [[0, *accumulate(map(len, side))] for side in (spelt, theirs.pieces)]
    read = [*theirs.ids, made.teacher.lm.stops.primary] if ends_itself else theirs.ids
    with torch.no_grad():
        whole = torch.tensor([[*prompt_ids, *read]])
        logits_LV = made.teacher.lm.model(input_ids=whole).logits[0, len(prompt_ids) - 1 : -1]
    logits_LV = logits_LV[:, : made.pair.width] / temperature
    logp_LV = logits_LV.log_softmax(-1)

    def unit(own: list[int], others: list[int]) -> Unit:
        chosen = torch.tensor([read[b] for b in others])[:, None]
        sums = [float(rows[others].gather(1, chosen).sum()) for rows in (logp_LV, logits_LV)]
        return Unit(own, others, logits_LV[others] * temperature, *sums)

    common = sorted(set(sides[0]) & set(sides[1]))
    cuts = [[(side.index(a), side.index(b)) for a, b in pairwise(common)] for side in sides]
    found = [unit(list(range(*own)), list(range(*others))) for own, others in zip(*cuts, strict=True)]
    unknown = [set(one.theirs) & {b for b, lost in enumerate(theirs.unknown) if lost} for one in found]
    found = [one for one, lost in zip(found, unknown, strict=True) if not lost]
    return [*found, unit([len(ids) - 1], [len(read) - 1])] if ends_itself else found


def equals(made: Made, said: Spans, groups: list[Group], temperature: float = 1.0) -> int:
    """Compares every column with slow passes; returns the number of units."""
    start, seen = 0, 0
    pairs = set(zip(made.pair.shared.student_K.tolist(), made.pair.shared.teacher_K.tolist(), strict=True))
    for rollout in (own for group in groups for own in group):
        prompt_ids = made.teacher.render(rollout.prompt).ids
        units = slowly(made, rollout, prompt_ids, temperature)
        free = set(range(rollout.steps))
        for unit in units:
            steps = [start + own for own in unit.own]
            free -= set(unit.own)
            assert len(set(said.unit_N[steps].tolist())) == 1
            assert said.own_N[steps].tolist() == [len(unit.own)] * len(steps)
            assert said.theirs_N[steps].tolist() == [len(unit.theirs)] * len(steps)
            assert said.logp_N[steps].tolist() == pytest.approx([unit.logp] * len(steps), abs=1e-10)
            assert said.raw_N is not None
            assert said.raw_N[steps].tolist() == pytest.approx([unit.raw] * len(steps), abs=1e-10)
            torch.testing.assert_close(said.logits(torch.tensor(steps[:1]))[0], unit.logits_IV[0], rtol=0, atol=1e-10)
            assert said.theirs is not None
            assert said.their_first_N is not None
            every = said.their_first_N[steps[0]] + torch.arange(len(unit.theirs))
            expected = unit.logits_IV / temperature
            found = said.theirs.distribution(every).logits_CV
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            ids_I = said.theirs.tokens_M[every]
            logp_I = expected.log_softmax(-1).gather(1, ids_I[:, None]).squeeze(1)
            torch.testing.assert_close(said.theirs.logp_M[every], logp_I, rtol=0, atol=1e-10)
            theirs = made.pair.read(rollout.sequence, prompt_ids).sequence.actions_A[unit.theirs].tolist()
            assert ids_I.tolist() == theirs
            single = len(unit.own) == len(unit.theirs) == 1
            ours = int(rollout.sequence.actions_A[unit.own[0]])
            assert said.matched_N[steps].tolist() == [single and (ours, theirs[0]) in pairs] * len(steps)
        left = [start + own for own in sorted(free)]
        assert said.unit_N[left].tolist() == [-1] * len(left)
        assert said.valid_N is not None
        assert not said.valid_N[left].any()
        start, seen = start + rollout.steps, seen + len(units)
    assert start == said.steps
    assert int(said.first_N.sum()) == seen
    return seen


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_column_is_that_of_slow_passes(made: Callable[..., Made], student: str, teacher: str) -> None:
    pair = made(student, teacher)
    groups = pair.batch()
    said = pair.score(groups)
    assert equals(pair, said, groups) > 8
    said.check_tokens(Pack.of([own for group in groups for own in group]).steps.tokens_N)
    assert int((said.own_N * said.first_N).max()) > 1 or int(said.theirs_N.max()) > 1, "there is a span among them"
    assert said.counts["bytes_one_to_one"] + said.counts["bytes_spans"] > 40


@pytest.mark.parametrize(("student", "teacher"), [("gemma", "byte-level"), ("byte-level", "unigram")])
def test_a_pair_knows_what_the_teachers_tokens_mean_in_the_students(
    made: Callable[..., Made], student: str, teacher: str
) -> None:
    """By the bytes of whole vocabularies; both sides of every unit spell the same."""
    pair = made(student, teacher)
    said = pair.score(pair.batch())
    assert said.theirs is not None
    assert said.theirs.prefixes is not None
    assert said.their_first_N is not None
    table = pair.pair.prefixes
    assert said.theirs.prefixes() is table, "found once"
    compared = 0
    for first in said.first_N.nonzero().squeeze(-1).tolist():
        place, own, theirs = (int(column[first]) for column in (said.their_first_N, said.own_N, said.theirs_N))
        ids, read = said.tokens_N[first : first + own], said.theirs.tokens_M[place : place + theirs]
        found = table.positions(ids.tolist(), read.tolist())
        if bool(said.matched_N[first]) and int(ids[0]) not in pair.pair.student_stops.tolist():
            assert found == [(0, b"", False)]
            assert int(table.root_V[read[0]]) == int(ids[0])
        compared += sum(1 for one in found if one is not None)
    assert compared > 8
    stops = pair.pair.teacher_stops
    assert table.root_V[stops].tolist() == [pair.student.stops.primary] * len(stops)


def test_a_completion_cut_inside_a_character_is_read_up_to_it(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "unigram")
    ids = pair.spelt(" fox ł", stop=False)
    whole, cut = (pair.score(in_groups([pair.rollout(own)])) for own in (ids, ids[:-1]))
    assert whole.valid_N is not None
    assert whole.valid_N.all()
    assert cut.unit_N[-1] == -1
    assert cut.counts["bytes_unread"] > whole.counts["bytes_unread"] == 0
    assert bool(cut.unit_N[0] == 0)
    torch.testing.assert_close(cut.logp_N[:1], whole.logp_N[:1], rtol=0, atol=1e-12)


def test_another_temperature(made: Callable[..., Made]) -> None:
    pair = made("llama", "gemma")
    groups = pair.batch()
    equals(pair, pair.score(groups, temperature=2.5), groups, 2.5)


def test_a_rollout_without_context_changes_nothing_else(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "unigram")
    view = privileged("solution")
    known = pair.rollout(pair.spelt(" jumps"), "hello", solution="the fox jumps")
    lacking = pair.rollout(pair.spelt(" over the"), "a b")
    said = pair.score(in_groups([lacking, known, replace(lacking, prompt=replace(lacking.prompt, id="c"))]), view=view)
    alone = pair.score(in_groups([known]), view=view)
    here = slice(lacking.steps, lacking.steps + known.steps)
    assert said.counts["no_context"] == 2
    assert said.valid_N is not None
    assert alone.valid_N is not None
    assert said.valid_N.tolist() == [False] * lacking.steps + alone.valid_N.tolist() + [False] * lacking.steps
    torch.testing.assert_close(said.logp_N[here], alone.logp_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(said.logits(here), alone.logits(slice(None)), rtol=0, atol=1e-12)
    none = pair.score(in_groups([lacking]), view=view)
    assert none.valid_N is not None
    assert not none.valid_N.any()
    assert none.unit_N.tolist() == [-1] * lacking.steps


def test_a_batch_that_the_teacher_cannot_read_has_no_unit(made: Callable[..., Made]) -> None:
    """All that was generated is a part of a character."""
    pair = made("bytes", "qwen")
    said = pair.score(in_groups([pair.rollout(pair.spelt("ł", stop=False)[:1])]))
    assert said.unit_N.tolist() == [-1]
    assert said.counts["bytes_unread"] == 1


def test_with_one_tokenizer_the_numbers_are_those_of_a_teacher_of_ids(made: Callable[..., Made]) -> None:
    pair = made("unigram", "byte-level")
    lm = pair.teacher.lm
    same = Made(lm, SpanTeacher(lm, alignment=align_spans(lm, lm, "it"), batch_tokens=32))
    groups = same.batch()
    said = same.score(groups)
    alike = LocalTeacher(lm, alignment=SameIds(same.pair.width), batch_tokens=32)
    expected = alike.score(groups, ScoreRequest(View(), frozenset({DENSE})))
    cut = said.unit_N < 0  # the part of a character
    assert cut.tolist() == [False] * said.steps or int(cut.sum()) == 1
    rows = expected.rows(slice(None))
    torch.testing.assert_close(said.logp_N[~cut], rows.sampled_logp_N[~cut], rtol=0, atol=1e-10)
    theirs_NV = said.logits(slice(None)).log_softmax(-1)
    torch.testing.assert_close(theirs_NV[~cut], rows.logp_NV[~cut], rtol=0, atol=1e-10)
    assert said.own_N[~cut].eq(1).all()
    assert said.theirs_N[~cut].eq(1).all()


def test_units_that_are_too_long_are_left_out(made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = made("bytes", "qwen")
    groups = in_groups([pair.rollout(pair.spelt("the answer is the answer"))])
    before = pair.score(groups)
    longest = int(before.own_N.max())
    assert longest > 2
    monkeypatch.setattr(spanned, "LONGEST_UNIT", longest - 1)
    said = pair.score(groups)
    kept = before.own_N < longest
    assert torch.equal(said.unit_N >= 0, kept)
    assert said.valid_N is not None
    assert torch.equal(said.valid_N, kept)
    assert said.own_N[~kept].eq(0).all()
    moved = before.counts["bytes_spans"] - said.counts["bytes_spans"]
    assert moved == said.counts["bytes_unread"] - before.counts["bytes_unread"] > 0
    torch.testing.assert_close(said.logp_N, torch.where(kept, before.logp_N, 0.0), rtol=0, atol=0)
    monkeypatch.setattr(spanned, "LONGEST_UNIT", 0)
    assert pair.score(groups).unit_N.eq(-1).all()


def test_what_a_teacher_that_read_nothing_gives_is_on_its_device() -> None:
    """Or a batch of which it reads nothing would end a run on an accelerator."""
    none = torch.zeros(0, dtype=torch.long, device="meta")
    signal = Dense(none, "teacher", lambda _: torch.zeros(0, 5, device="meta"), 5)
    assert [one.device.type for one in spanned._sampled(signal)] == ["meta", "meta"]


def test_the_teacher_reads_its_own_stop_for_the_students(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "unigram", stop="<end>")
    stops = pair.student.stops.primary, pair.teacher.lm.stops.primary
    assert pair.student.tokenizer.convert_ids_to_tokens(stops[0]) == "</s>"
    assert pair.teacher.lm.tokenizer.convert_ids_to_tokens(stops[1]) == "<end>"
    groups = in_groups([pair.rollout(pair.spelt(" fox"))])
    said = pair.score(groups)
    equals(pair, said, groups)
    assert bool(said.matched_N[-1])
    read = pair.pair.read(groups[0][0].sequence, [1]).sequence.actions_A.tolist()
    assert read[-1] == stops[1]
    assert said.stops is not None
    assert [ids.tolist() for ids in said.stops] == [[stops[0]], [stops[1]]]
    plain = made("byte-level", "unigram")
    assert float(plain.score(groups).logp_N[-1]) != pytest.approx(float(said.logp_N[-1]), abs=1e-3)


# --- completions of the teacher's ---


@pytest.mark.parametrize(("student", "teacher"), [("byte-level", "unigram"), ("llama", "bytes"), ("gemma", "llama")])
def test_a_completion_of_the_teachers_is_the_same_text_to_the_student(
    made: Callable[..., Made], student: str, teacher: str
) -> None:
    pair = made(student, teacher, stop="<end>")
    text = " lazy dog,\n\tnaïve 你好 ł"
    theirs = retokenize(pair.teacher.lm.tokenizer, text).ids
    stop = pair.teacher.lm.stops.primary
    ours = pair.pair.to_student([*theirs, stop])
    assert ours[-1] == pair.student.stops.primary
    assert b"".join(pieces(pair.student.tokenizer, ours[:-1], [0])).decode() == text
    assert pair.pair.to_student(theirs) == ours[:-1], "without a stop where the teacher was cut off"
    assert pair.pair.to_student([stop]) == [pair.student.stops.primary]
    assert pair.pair.to_student([]) == []
    rollout = pair.rollout(ours)
    assert pair.pair.read(rollout.sequence, [1]).sequence.actions_A.tolist() == [*theirs, stop]


def test_what_the_student_cannot_spell_is_refused(made: Callable[..., Made]) -> None:
    pair = made("t5", "llama")
    ids = retokenize(pair.teacher.lm.tokenizer, "the ł").ids
    with pytest.raises(SignalError, match="the student's tokenizer cannot spell all that it generated"):
        pair.pair.to_student(ids)


def test_a_completion_of_the_teachers_that_was_cut_inside_a_character_loses_its_end(made: Callable[..., Made]) -> None:
    pair = made("unigram", "byte-level")
    ids = retokenize(pair.teacher.lm.tokenizer, "the ł").ids
    ours = pair.pair.to_student(ids[:-1])
    assert b"".join(pieces(pair.student.tokenizer, ours, [0])) == b"the "


def test_bytes_that_are_no_text_end_what_the_student_reads_of_an_answer(made: Callable[..., Made]) -> None:
    """Nothing is left out of the middle: that would be another text than the teacher's."""
    pair = made("unigram", "byte-level")
    before, cut, after = (retokenize(pair.teacher.lm.tokenizer, text).ids for text in ("the ", "ł", "fox"))
    with pytest.raises(Unspelt) as refused:
        pair.pair.to_student([*before, *cut[:-1], *after])
    assert b"".join(pieces(pair.student.tokenizer, refused.value.before, [0])) == b"the "


def test_a_teacher_in_its_own_ids_is_one_of_ids(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "unigram")
    own = pair.teacher.in_own_ids()
    assert type(own) is LocalTeacher
    assert own.alignment.vocab == pair.pair.width
    assert "tokens are the same to both" in pair.pair.describe(pair.student.tokenizer, pair.teacher.lm.tokenizer)


def test_each_sequence_of_an_episode_is_read_by_itself(made: Callable[..., Made]) -> None:
    """Their signal is that of completions of one turn, whose prompts are those of the sequences."""
    pair = made("byte-level", "unigram")
    history, turns = (Message("assistant", " fox"), Message("user", "a b c")), (" fox", " lazy dog")
    first = pair.rollout(pair.spelt(turns[0]))
    asked = replace(first.prompt, id="later", messages=(*first.prompt.messages, *history))
    before = pair.student.tokenizer(asked.text, add_special_tokens=False)["input_ids"]
    later = Rollout(asked, TokenSequence.of(before).then(pair.spelt(turns[1]), decided=True))
    episode = Rollout(first.prompt, (first.sequence, later.sequence), histories=(history,))
    one, two = pair.score(in_groups([episode])), pair.score(in_groups([first, later]))
    assert torch.equal(one.unit_N, two.unit_N)
    torch.testing.assert_close(one.rows(slice(None)).sampled_logp_N, two.rows(slice(None)).sampled_logp_N)


# --- episodes ---

#: The teacher's template; what an environment replied stands in another form in the student's ids.
CHAT = (
    "{% for one in messages %}{{ one.role }}: {{ one.content }}{% if one.role == 'assistant' %}<end>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SAID = ["no, it's 3:45", "Größe? 你好"]


def episode(pair: Made, turns: Sequence[str] = (" lazy dog", "the answer is", " x **2")) -> Rollout:
    """Turns that end in the student's stop, between which an environment replies in ids of the student's."""
    first, *later = (pair.spelt(turn) for turn in turns)
    rollout = pair.rollout(first)
    sequence, turn_A = rollout.sequence, [0] * len(first)
    for number, (said, ids) in enumerate(zip(SAID, later, strict=False), 1):
        sequence = sequence.then(retokenize(pair.student.tokenizer, f"? {said} !").ids).then(ids, decided=True)
        turn_A += [number] * len(ids)
    outcomes = tuple(Outcome((Message("user", said),)) for said in SAID)
    return replace(rollout, sequences=(sequence,), turn_A=torch.tensor(turn_A), outcomes=outcomes)


@pytest.mark.parametrize(("student", "teacher"), [("byte-level", "unigram"), ("gemma", "byte-level")])
def test_a_turn_is_scored_behind_the_conversation_in_the_teachers_own_form(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, student: str, teacher: str
) -> None:
    """Each turn's bytes are aligned by themselves; the numbers are those of slow passes over the whole conversation."""
    pair = made(student, teacher, stop="<end>")
    tokenizer, stop = pair.teacher.lm.tokenizer, pair.teacher.lm.stops.primary
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    rollout = episode(pair)
    said = pair.score(in_groups([rollout, replace(pair.rollout(pair.spelt(" fox"), "hello"))]))
    conversation = list(pair.teacher.render(rollout.prompt).ids)
    assert tokenizer.decode(conversation) == f"user: {TEXT}\nassistant: "
    start, before = 0, rollout.sequence.prefix.read()
    for number, run in enumerate(rollout.sequence.continuation.pieces()):
        ids: list[int] = run.tokens_L.tolist()
        if number % 2:
            follows = f"\nuser: {SAID[number // 2]}\nassistant: "
            conversation += tokenizer(follows, add_special_tokens=False)["input_ids"]
        else:
            alone = replace(rollout, sequences=(before.then(ids, decided=True),), turn_A=None)
            units = slowly(pair, alone, conversation)
            for unit in units:
                steps = [start + own for own in unit.own]
                assert said.theirs_N[steps].tolist() == [len(unit.theirs)] * len(steps)
                assert said.logp_N[steps].tolist() == pytest.approx([unit.logp] * len(steps), abs=1e-10)
                torch.testing.assert_close(
                    said.logits(torch.tensor(steps[:1]))[0], unit.logits_IV[0], rtol=0, atol=1e-10
                )
            assert len(said.unit_N[start : start + len(ids)].unique()) == len(units) > 1
            conversation += [*retokenize(tokenizer, pair.student.tokenizer.decode(ids[:-1])).ids, stop]
            start += len(ids)
        before = before.then(ids)
    assert pair.teacher.spelt(rollout.sequence)[-1] == "<end>"
    for turns in (1, 2):  # a rollout that is cut behind a turn has the replies that it needs
        steps = int((rollout.turn_A < turns).sum())
        cut = pair.score(in_groups([rollout.cut(steps, "")]))
        torch.testing.assert_close(cut.logp_N, said.logp_N[:steps], rtol=0, atol=1e-10)


def test_replies_that_cannot_be_read_are_refused_in_one_line(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = made("byte-level", "unigram", stop="<end>")
    rollout = episode(pair)
    with pytest.raises(UserError, match="which has another tokenizer than the student: .* no conversations"):
        pair.score(in_groups([rollout]))
    monkeypatch.setattr(pair.teacher.lm.tokenizer, "chat_template", CHAT)
    with pytest.raises(SignalError, match="2 replies of an environment without their messages"):
        pair.score(in_groups([replace(rollout, outcomes=rollout.outcomes[:1])]))
    unended = rollout.sequence.then([5]).then(pair.spelt("so"), decided=True)
    unended = replace(
        rollout, sequences=(unended.part(0, len(unended) - 1).then([7]).then([8], decided=True),), turn_A=None
    )
    with pytest.raises(SignalError, match="replies to a turn without a stop"):
        pair.score(in_groups([unended]))
