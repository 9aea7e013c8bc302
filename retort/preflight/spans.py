"""Checks of a teacher with another tokenizer: what both have in common, and how each stops."""

from __future__ import annotations

from retort.align.aligned import Coverage
from retort.align.retokenize import retokenize
from retort.align.stops import named_stops
from retort.align.text import decode
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UserError
from retort.preflight.findings import Check
from retort.teachers.spanned import SpanTeacher
from retort.train.setup.prepare import Prepared

#: Number of rows of the data whose texts are aligned.
PROBES = 64


def check_units(prepared: Prepared, teacher: SpanTeacher) -> Check:
    """Checks how much of the data's texts both cut alike."""
    why = (
        "the teacher scores units that spell the same bytes on both sides: in a span of several tokens it says less, "
        "and about bytes in no unit nothing"
    )
    pair, student = teacher.pair, prepared.student
    saw = pair.describe(student.tokenizer, teacher.lm.tokenizer)
    found, answered = Coverage(), all(prompt.response is not None for prompt in prepared.source.prompts[:PROBES])
    for prompt in prepared.source.prompts[:PROBES]:
        try:
            text = str(prompt.response) if answered else prompt.messages[-1].content
            ids = retokenize(student.tokenizer, text).ids
            sequence = TokenSequence.of([student.stops.primary]).then(ids, decided=True)
            read = pair.read(sequence, [teacher.lm.stops.primary])
        except (SignalError, UserError) as error:
            remedy = "see docs/tokenizers.md for what can be aligned"
            return Check("units", "fatal", f"row '{prompt.id}': {error}", why, remedy)
        found = found + read.coverage
    total, lost = found.bytes, sum(found.lost.values())
    if not total:
        return Check("units", "ok", f"{saw}; the data has no text to try it on", why)
    parts = {"one_to_one": found.single / total, "spans": found.spans / total, "unread": lost / total}
    what = "answers" if answered else "prompts"
    saw += (
        f"; of {total:,} bytes of the data's {what} {parts['one_to_one']:.0%} are in units of one token on each side, "
        f"{parts['spans']:.0%} in longer ones, {parts['unread']:.0%} in none"
    )
    values = (*parts.items(), ("shared", float(len(pair.shared))))
    if not lost:
        return Check("units", "ok", saw, why, values=values)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in found.lost.items())
    remedy = "see docs/tokenizers.md; a teacher whose tokenizer knows these characters reads all of it"
    return Check("units", "warn", f"{saw} ({reasons})", why, remedy, values)


def check_span_stops(prepared: Prepared, teacher: SpanTeacher) -> Check:
    """Shows which tokens end generation on either side: each side reads the other's as its own."""
    why = "a student that never learns to stop generates until it is cut off, and learns from that"
    ours, theirs = (named_stops(lm.stops, lm.tokenizer) for lm in (prepared.student, teacher.lm))
    saw = f"the student stops with {ours}, which the teacher reads as its own stop: {theirs}"
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
