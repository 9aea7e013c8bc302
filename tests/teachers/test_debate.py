"""What a debate asks, what is read of it, what its views show, and that it never holds a word of the student's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retort import registry
from retort.core.passages import Passage
from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.tasks.coached import TEMPLATES as COACHED
from retort.teachers.debate import debate, debated, read_confidence, repeats, repetition, transcript
from retort.teachers.drafts import Author, Draft, Turn, blind
from retort.teachers.moving import live, trust_region
from retort.teachers.rationale import reasoned
from retort.teachers.summaries import excerpt, summaries, summary_of
from retort.teachers.view_input import Stage, ViewInput

PROMPT = Prompt("p", (Message("system", "Be brief."), Message("user", "What is 3 + 4?")), privileged={"solution": "7"})


def rollout(text: str = "the student said so", passages: tuple[Passage, ...] = ()) -> Rollout:
    sequence = TokenSequence.of([5]).then([6, 7], decided=True)
    return Rollout(PROMPT, (sequence,), text=text, passages=passages)


def said(author: int, number: int, text: str, confidence: float | None = None) -> Passage:
    return Passage("debate", author, f"teacher_{author}", number, text, confidence=confidence)


def asked(draft: Draft, passages: list[Passage], turn: Turn, of: Rollout | None = None) -> str:
    own = blind(of or rollout())
    prompt = draft.ask(ViewInput(own, (own,)), passages, turn)
    assert prompt is not None
    return prompt.messages[-1].content


@pytest.mark.parametrize(
    ("text", "confidence"),
    [
        ("<<CONFIDENCE=40>> no, rather <<CONFIDENCE=90>>", 90.0),
        ("I am 90% sure, confidence 90%", None),
        ("<<CONFIDENCE=>>", None),
        ("<<CONFIDENCE=250>>", None),
        ("<< confidence = 5 >>", 5.0),
        ("<<CONFIDENCE=-5>>", None),
        ("", None),
    ],
)
def test_the_last_tag_counts_and_prose_does_not(text: str, confidence: float | None) -> None:
    assert read_confidence(text) == confidence


def test_repetition_is_the_share_of_runs_of_words_that_were_there_before() -> None:
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("no " * 100) > 0.9
    assert repetition("two words") == 0.0
    assert repetition("") == 0.0
    leaves_out = repeats(0.6)
    assert leaves_out is not None
    assert leaves_out(rollout("no " * 100))
    assert not leaves_out(rollout("all of these words differ here"))
    assert repeats(1.0) is None
    with pytest.raises(UserError, match="repetition_limit"):
        repeats(1.5)


def test_a_rollout_that_repeats_itself_has_no_context_under_any_view_of_a_debate() -> None:
    loop = rollout("no " * 100, (said(0, 0, "seven"),))
    for name in ("mt_opd", "mad_opd", "opad"):
        for view in registry.load(name).views.values():
            assert view.prompt(ViewInput(loop, (loop,))) is None
            kept = replace(loop, text="it is seven")
            assert view.prompt(ViewInput(kept, (kept,))) is not None


def test_the_first_round_sees_nobody_and_later_ones_see_all_earlier_ones() -> None:
    draft = debate(["teacher", "teacher_2"], rounds=2)
    first = asked(draft, [], Turn(1, 0, last=False))
    assert "expert 2" in first
    assert "<discussion>" not in first
    again = asked(draft, [said(0, 0, "seven it is"), said(1, 0, "rather eight")], Turn(0, 1, last=True))
    assert "[Expert 1, round 1]\nseven it is" in again
    assert "[Expert 2, round 1]\nrather eight" in again
    assert "expert 1" in again
    assert again.index("<discussion>") < again.index("need not agree")
    assert "<<CONFIDENCE=N>>" in first
    assert "<<CONFIDENCE=N>>" in again
    assert "CONFIDENCE" not in asked(debate(["teacher"], confidence=False), [], Turn(0, 0, last=True))


def test_with_templates_without_words_the_question_alone_is_asked() -> None:
    own = blind(rollout())
    words = ViewInput(own, (own,), Stage(COACHED))
    written = debate(["teacher"])
    assert written.ask(words, [], Turn(0, 0, last=False)) is PROMPT
    again = written.ask(words, [said(0, 0, "3 + 4 = 7")], Turn(0, 1, last=True))
    assert again is not None
    assert again.messages[-1].content == "maybe 3 + 4 = 7 ; What is 3 + 4?"


def test_what_the_student_wrote_is_not_even_in_the_input_of_a_debate() -> None:
    own = blind(rollout("a secret of the student"))
    assert own.text == ""
    assert own.steps == 0
    assert own.passages == ()
    assert own.reward is None
    assert "secret" not in asked(debate(["teacher"]), [], Turn(0, 0, last=False), rollout("a secret of the student"))


def test_a_transcript_has_no_thoughts_and_nobody_who_said_nothing() -> None:
    own = rollout()
    text = transcript(
        ViewInput(own, (own,)),
        [said(0, 0, "<think>hm</think> seven"), said(1, 0, "<think>for ever"), said(0, 1, "eight")],
    )
    assert text == "[Expert 1, round 1]\nseven\n\n[Expert 1, round 2]\neight"


def test_each_teacher_is_told_who_it_is_and_nothing_is_shown_where_nothing_was_said() -> None:
    draft = debate(["teacher", "teacher_2"])
    view = debated("teacher_2", 1, draft, shown=True, leaves_out=None)
    assert view.models == ("teacher_2", "teacher")
    silent = rollout(passages=(said(0, 0, " "),))
    assert view.prompt(ViewInput(silent, (silent,))) is None
    spoken = rollout(passages=(said(0, 0, "seven"), Passage("other", 0, "m", 0, "hidden")))
    prompt = view.prompt(ViewInput(spoken, (spoken,)))
    assert prompt is not None
    assert prompt.messages[0] == PROMPT.messages[0]
    text = prompt.messages[1].content
    assert "expert 2" in text
    assert "seven" in text
    assert "hidden" not in text
    off = debated("teacher", 0, draft, shown=False, leaves_out=None)
    assert off.prompt(ViewInput(spoken, (spoken,))) is PROMPT


def test_confidences_reach_the_table_of_steps_by_rollout_and_by_sequence() -> None:
    one = rollout(passages=(said(0, 0, "x", 10.0), said(0, 1, "x", 95.0), said(1, 1, "x", 90.0)))
    none = rollout()
    pack = Pack.of([one, none])
    table = pack.steps.confidence_NK
    assert table is not None
    assert table[:2].tolist() == [[95.0, 90.0]] * 2
    assert bool(table[2:].isnan().all())
    assert Pack.of([none]).steps.confidence_NK is None
    later = TokenSequence.of([5, 6]).then([8], decided=True)
    both = replace(
        one,
        sequences=(*one.sequences, later),
        histories=((Message("user", "and?"),),),
        passages=(replace(said(0, 0, "x", 20.0), sequence=0), replace(said(0, 0, "x", 30.0), sequence=1)),
    )
    table = Pack.of([both]).steps.confidence_NK
    assert table is not None
    assert table.tolist() == [[20.0], [20.0], [30.0]]


def test_a_teacher_that_never_writes_has_a_confidence_too_and_other_texts_have_none() -> None:
    draft = debate(["teacher", "teacher_2", "teacher_3"], rounds=1)
    alone = draft.passage(Turn(0, 0, last=True), "seven <<CONFIDENCE=90>>")
    summary = summaries("student").passage(Turn(0, 0, last=True), "it tried")
    table = Pack.of([rollout(passages=(alone, summary))]).steps.confidence_NK
    assert table is not None
    assert table[0].nan_to_num(-1).tolist() == [90.0, -1.0, -1.0], "all of them weigh the same, and the run goes on"


def test_the_sequences_of_an_episode_apart_have_their_own_conversation_and_passages() -> None:
    first = rollout(passages=(replace(said(0, 0, "one"), sequence=0), replace(said(0, 0, "two"), sequence=1)))
    later = TokenSequence.of([5, 6]).then([8], decided=True)
    episode = replace(
        first, sequences=(*first.sequences, later), histories=((Message("assistant", "7"), Message("user", "and?")),)
    )
    parts = episode.apart()
    assert [own.passages[0].text for own in parts] == ["one", "two"]
    assert [own.prompt.messages[-1].content for own in parts] == ["What is 3 + 4?", "and?"]
    assert [own.steps for own in parts] == [2, 1]
    assert all(own.text == "" for own in parts), "what the student wrote is not known of a part"


def test_a_rationale_is_asked_for_with_the_solution_in_sight_and_shown_behind_it() -> None:
    view = reasoned("solution", max_new_tokens=9)
    draft = view.draft
    assert draft is not None
    assert draft.max_new_tokens == 9
    assert "7" in asked(draft, [], Turn(0, 0, last=True))
    noted = rollout(passages=(Passage("rationale", 0, "student", 0, "three and four make it"),))
    prompt = view.prompt(ViewInput(noted, (noted,)))
    assert prompt is not None
    text = prompt.messages[-1].content
    assert text.index("<solution>") < text.index("three and four make it")
    bare = rollout()
    alone = view.prompt(ViewInput(bare, (bare,)))
    assert alone is not None
    assert "<notes>" not in alone.messages[-1].content
    lacking = replace(bare, prompt=replace(PROMPT, privileged={}))
    own = ViewInput(lacking, (lacking,))
    assert view.prompt(own) is None
    assert draft.ask(own, [], Turn(0, 0, last=True)) is None


def test_a_sentence_about_a_sibling_is_its_own_summary_or_its_beginning_or_what_was_written() -> None:
    assert excerpt("<think>hm</think> long <summary> short </summary>") == "short"
    assert excerpt("x" * 400) == "x" * 300
    draft = summaries("student")
    of = rollout("long text", (Passage("summary", 0, "student", 0, "<summary>it tried</summary> bye"),))
    assert summary_of(of, draft) == "it tried"
    assert summary_of(of, None) == "long text"
    assert summary_of(rollout("long text"), draft) == "long text"


def test_who_cannot_write_is_refused() -> None:
    with pytest.raises(UserError, match="moving weights"):
        Author("teacher", live())
    with pytest.raises(UserError, match="mixes the logits"):
        Author("student", trust_region(0.1))
    with pytest.raises(UserError, match="at least one model"):
        debate([])
    with pytest.raises(UserError, match="top_p"):
        debate(["teacher"], top_p=0.0)
