"""Checks of a teacher with another tokenizer: what both have in common, and how each stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from retort.align.aligned import Coverage
from retort.align.retokenize import retokenize
from retort.align.spanned import SpanPair
from retort.align.stops import StopTokens, named_stops
from retort.align.text import decode
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UserError
from retort.models.lm import LanguageModel
from retort.preflight.findings import Check
from retort.teachers.spanned import SpanTeacher
from retort.train.setup.prepare import Prepared

#: Number of rows of the data whose texts are aligned.
PROBES = 64
#: Number of shapes of units that are shown.
SHAPES = 6


def check_units(prepared: Prepared, teacher: SpanTeacher) -> Check:
    """Checks how much of the data's texts both cut alike."""
    why = (
        "the teacher scores units that spell the same bytes on both sides: in a span of several tokens it says less, "
        "and about bytes in no unit nothing"
    )
    pair, student = teacher.pair, prepared.student
    saw = f"{len(pair.shared):,} tokens are the same to both"
    ours, theirs = Counter[int](), Counter[int]()
    found, answered = Coverage(), all(prompt.response is not None for prompt in prepared.source.prompts[:PROBES])
    for prompt in prepared.source.prompts[:PROBES]:
        try:
            text = str(prompt.response) if answered else prompt.messages[-1].readable
            ids = retokenize(student.tokenizer, text).ids
            sequence = TokenSequence.of([student.stops.primary]).then(ids, decided=True)
            read = pair.units(sequence)
        except (SignalError, UserError) as error:
            remedy = "see docs/tokenizers.md for what can be aligned"
            return Check("units", "fatal", f"row '{prompt.id}': {error}", why, remedy)
        found = found + read.coverage
        ours.update(ids)
        theirs.update(read.sequence.actions_A.tolist())
    total, lost = found.bytes, sum(found.lost.values())
    if not total:
        return Check("units", "ok", f"{saw}; the data has no text to try it on", why)
    parts = {"one_to_one": found.single / total, "spans": found.spans / total, "unread": lost / total}
    what = "answers" if answered else "prompts"
    saw += (
        f"; of {total:,} bytes of the data's {what} {parts['one_to_one']:.0%} are in units of one token on each side, "
        f"{parts['spans']:.0%} in longer ones, {parts['unread']:.0%} in none"
    )
    lacking = without_counterpart(pair, ours, theirs)
    saw += (
        f"; of the tokens there {lacking['student_tokens']:.1%} of the student's and {lacking['teacher_tokens']:.1%} "
        f"of the teacher's have no counterpart, of the vocabularies {lacking['student_ids']:.0%} and "
        f"{lacking['teacher_ids']:.0%}"
    )
    values = (*parts.items(), ("shared", float(len(pair.shared))), *((f"lacking/{k}", v) for k, v in lacking.items()))
    values += tuple((f"units/{own}:{other}", float(count)) for (own, other), count in _shapes(found))
    table = (("units", "share", "student's tokens : teacher's"), *_shape_rows(found))
    if not lost:
        return Check("units", "ok", saw, why, values=values, table=table)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in found.lost.items())
    remedy = "see docs/tokenizers.md; a teacher whose tokenizer knows these characters reads all of it"
    return Check(
        "units", "warn" if lost < total else "fatal", f"{saw} (in none: {reasons} bytes)", why, remedy, values, table
    )


def without_counterpart(pair: SpanPair, ours: Counter[int], theirs: Counter[int]) -> dict[str, float]:
    """The shares of ids that are no token of the other side: of the vocabularies, and of some tokens.

    Args:
        pair: The alignment.
        ours: How often each of the student's ids was seen.
        theirs: The same of the teacher's.
    """
    shared = pair.shared
    return {
        "student_ids": shared.student_lacking / max(shared.student_vocab, 1),
        "teacher_ids": shared.teacher_lacking / max(shared.teacher_vocab, 1),
        "student_tokens": _outside(ours, shared.student_K.tolist()),
        "teacher_tokens": _outside(theirs, shared.teacher_K.tolist()),
    }


def _outside(seen: Counter[int], known: Sequence[int]) -> float:
    inside = set(known)
    return sum(count for token, count in seen.items() if token not in inside) / max(seen.total(), 1)


def _shapes(found: Coverage) -> list[tuple[tuple[int, int], int]]:
    """Numbers of tokens of a unit on both sides, the most frequent first."""
    return sorted(found.lengths.items(), key=lambda item: (-item[1], item[0]))


def _shape_rows(found: Coverage) -> list[tuple[str, ...]]:
    total, shapes = sum(found.lengths.values()), _shapes(found)
    if not total:
        return []
    rows = [(f"{count:,}", f"{count / total:.1%}", f"{own}:{other}") for (own, other), count in shapes[:SHAPES]]
    rest = sum(count for _, count in shapes[SHAPES:])
    longest = max((max(shape) for shape, _ in shapes[SHAPES:]), default=0)
    more = (f"{rest:,}", f"{rest / total:.1%}", f"others, of up to {longest} tokens on a side")
    return [*rows, *([more] if rest else [])]


def check_span_stops(prepared: Prepared, teacher: SpanTeacher) -> Check:
    """Shows which tokens end generation on either side: each side reads the other's as its own."""
    why = "a student that never learns to stop generates until it is cut off, and learns from that"
    student, other = prepared.student, teacher.lm
    controls = teacher.pair.teacher_reader.controls

    def named(lm: LanguageModel, ids: Sequence[int]) -> str:
        return ", ".join(named_stops(StopTokens(frozenset({token}), token), lm.tokenizer) for token in ids)

    further = sorted(student.stops.ids - {student.stops.primary})
    read = [f"{named(student, [token])} as {named(other, [controls[token]])}" for token in further]
    alone = sorted(other.stops.ids - {controls[token] for token in student.stops.ids})
    saw = (
        f"the student stops with {named(student, [student.stops.primary])}, which the teacher reads as its own stop: "
        f"{named(other, [other.stops.primary])}"
    )
    saw += f"; it reads {', '.join(read)}" if read else ""
    saw += f"; no stop of the student's is read as {named(other, alone)}, with which it stops, too" if alone else ""
    return Check("stop token", "ok", saw, why)


def check_span_templates(
    prepared: Prepared, teacher: SpanTeacher, mine: list[int], other: list[int], why: str
) -> Check:
    """Compares the text of a probe question as the student and the teacher read it."""
    counts = f"{len(mine)} ids to the student and {len(other)} to the teacher"
    if same_text(prepared, teacher, mine, other):
        return Check("chat template", "ok", f"a probe question is the same text to both, {counts}", why)
    saw = f"a probe question is another text to the teacher, {counts}"
    return Check("chat template", "warn", saw, why, "fine if each has the template it was trained with")


def same_text(prepared: Prepared, teacher: SpanTeacher, mine: list[int], other: list[int]) -> bool:
    """Whether two renderings of a prompt, each in its model's ids, are one text."""
    return decode(prepared.student.tokenizer, mine) == decode(teacher.lm.tokenizer, other)
