"""What stands between two decisions reaches everybody who reads a rollout, and media keep equal tokens apart.

One rollout of three turns, with what an environment said between them, goes through every reader; each is compared with
the model's own logits on the whole sequence, or with the rollout itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.align.chat import TemplateOptions
from retort.align.pair import SameIds
from retort.align.stops import StopMap, StopTokens
from retort.core.needs import DENSE, SAMPLED
from retort.core.random_streams import UniformStream, uniforms
from retort.core.rollouts import Message, Pack, Prompt, Rollout, Status, in_groups
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.evaluate import trust
from retort.evaluate.evaluator import Evaluator
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.packing import Row, row_batches
from retort.rewards import ByText
from retort.rollout.by_teacher import TeacherGenerator
from retort.rollout.engines.decode import read_once
from retort.rollout.engines.hf import HFEngine, Request, Sampling
from retort.rollout.episodes import Task
from retort.rollout.plan import RolloutPlan
from retort.rollout.record import token_row
from retort.teachers.base import ScoreRequest
from retort.teachers.itself import OwnWeights, SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.moving import frozen, live, trust_region
from retort.teachers.view import View
from retort.train.source.cache import RolloutCache

TEXT = "3 + 4 ="
STOP, OTHER = 2, 4
VOCAB = 50
TURNS = ([12, 13, STOP], [20, STOP], [7, 8, 9, STOP])
#: What the environment says holds both stops: they are read there, not decided.
SAID = ([30, STOP, OTHER], [31])
CPU = torch.device("cpu")


def three_turns(prompt_ids: Sequence[int], *, identity: str = "p", member: int = 0) -> Rollout:
    sequence = TokenSequence.of(prompt_ids)
    for number, ids in enumerate(TURNS):
        sequence = sequence.then(ids, decided=True)
        sequence = sequence.then(SAID[number]) if number < len(SAID) else sequence
    turns = [number for number, ids in enumerate(TURNS) for _ in ids]
    return Rollout(
        Prompt(identity, (Message("user", TEXT),)),
        sequence,
        turn_A=torch.tensor(turns),
        engine_logp_A=-torch.arange(1.0, 1 + sequence.steps),
        member=member,
        text="as decoded",
        reward=1.0,
    )


def single(prompt_ids: Sequence[int]) -> Rollout:
    prompt = Prompt("s", (Message("user", TEXT),))
    return Rollout(prompt, TokenSequence.of(prompt_ids).then([7, 8], decided=True), engine_logp_A=-torch.ones(2))


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> LanguageModel:
    return load_model(str(model_folder(seed=2)), role="student", precision="fp32", device=CPU)


@pytest.fixture
def rollout(lm: LanguageModel) -> Rollout:
    return three_turns(lm.tokenizer(TEXT)["input_ids"])


def own_logp(lm: LanguageModel, sequences: Sequence[TokenSequence]) -> Tensor:
    """The model's own log-probs [N, V] before every decision, each sequence in full and by itself."""
    found: list[Tensor] = []
    for sequence in sequences:
        with torch.no_grad():
            logits_LV = lm.model(input_ids=sequence.tokens_L[None]).logits[0, :, :VOCAB]
        found.append(logits_LV[:-1][sequence.action_mask_L[1:]].log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("way", ["alone", "padded", "packed", "shared"])
def test_every_pass_of_a_model_reads_all_of_it(lm: LanguageModel, rollout: Rollout, way: str) -> None:
    sequences = [rollout.sequence, single(rollout.sequence.prefix.tokens_L.tolist()).sequence, rollout.sequence.cut(4)]
    assert lm.packs
    assert lm.shared_prefixes
    lm.shared_prefixes = way == "shared"
    try:
        with torch.no_grad():
            hidden_ND = getattr(lm, "packed" if way == "shared" else way)(sequences)
    finally:
        lm.shared_prefixes = True
    logp_NV = lm.head().logits(hidden_ND)[:, :VOCAB].log_softmax(-1)
    torch.testing.assert_close(logp_NV, own_logp(lm, sequences), rtol=1e-4, atol=1e-4)


def local(lm: LanguageModel, stop_map: Any = None) -> LocalTeacher:
    return LocalTeacher(lm, alignment=SameIds(VOCAB, StopMap(stop_map or {})), batch_tokens=64)


def itself(lm: LanguageModel, kind: Any) -> SelfTeacher:
    return SelfTeacher(local(lm), OwnWeights(lm, [kind]))


#: Every teacher: how it is made, under which view it is asked, and how it reads stops.
TEACHERS: dict[str, tuple[Callable[[LanguageModel], Any], View, StopMap]] = {
    "local": (local, View(), StopMap()),
    "local, other stops": (
        lambda lm: local(lm, StopMap({STOP: OTHER, OTHER: STOP})),
        View(),
        StopMap({STOP: OTHER, OTHER: STOP}),
    ),
    "itself, live": (lambda lm: itself(lm, live()), View(model="student", weights=live()), StopMap()),
    "itself, frozen": (lambda lm: itself(lm, frozen()), View(model="student", weights=frozen()), StopMap()),
    "itself, trust region": (
        lambda lm: itself(lm, trust_region(0.5)),
        View(model="student", weights=trust_region(0.5)),
        StopMap(),
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_reads_what_the_student_read(lm: LanguageModel, rollout: Rollout, name: str) -> None:
    make, view, stops = TEACHERS[name]
    pack = Pack.of([rollout, single(rollout.sequence.prefix.tokens_L.tolist())])
    logp_NV = own_logp(lm, [own.sequence.mapped(stops) for own in pack.rollouts])
    here, there = list(stops), list(stops.values())
    logp_NV[:, here] = logp_NV[:, there]
    for needs in (frozenset({SAMPLED}), frozenset({DENSE})):
        signal = make(lm).score(in_groups(pack.rollouts), ScoreRequest(view, needs))
        signal.check_tokens(pack.steps.tokens_N)
        found_N = signal.rows(slice(None)).sampled_logp_N
        torch.testing.assert_close(
            found_N, logp_NV.gather(1, pack.steps.tokens_N[:, None]).squeeze(1), rtol=1e-4, atol=1e-4
        )


def test_a_teacher_behind_another_prompt_reads_what_stands_between(lm: LanguageModel, rollout: Rollout) -> None:
    shown = Prompt("q", (Message("user", "so the answer is 3 ="),))
    view = View(render=lambda scene: shown)
    teacher = local(lm)
    sequence = rollout.sequence.with_prefix(TokenSequence.of(teacher.render(shown).ids))
    said = teacher.score([(rollout,)], ScoreRequest(view, frozenset({SAMPLED})))
    found_N = said.rows(slice(None)).sampled_logp_N
    expected_N = own_logp(lm, [sequence]).gather(1, said.tokens_N[:, None]).squeeze(1)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-4, atol=1e-4)


def test_a_teacher_need_not_know_the_ids_of_the_students_prompt(lm: LanguageModel) -> None:
    rollout = three_turns([lm.rows + 7, 5])
    pack = Pack.of([rollout])
    found_N = (
        local(lm)
        .score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({SAMPLED})))
        .rows(slice(None))
        .sampled_logp_N
    )
    sequence = rollout.sequence.with_prefix(TokenSequence.of(lm.tokenizer(TEXT)["input_ids"]))
    expected_N = own_logp(lm, [sequence]).gather(1, pack.steps.tokens_N[:, None]).squeeze(1)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-4, atol=1e-4)


def test_the_room_of_a_view_is_what_the_whole_continuation_leaves(lm: LanguageModel, rollout: Rollout) -> None:
    long = rollout.sequence.prefix.then([7], decided=True).then([30] * (lm.context - 20)).then([8], decided=True)
    shown = Prompt("q", (Message("user", "so " * 30),))
    pack = Pack.of([Rollout(rollout.prompt, long)])
    read = local(lm).prompts(pack, View(render=lambda scene: shown)).contexts[0]
    assert read is None or len(read) + len(long.continuation) <= lm.context


def test_a_pack_has_its_turns(rollout: Rollout) -> None:
    pack = Pack.of([rollout, single([5])])
    assert pack.steps.tokens_N.tolist() == [token for ids in TURNS for token in ids] + [7, 8]
    assert pack.steps.turn_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0]


def test_a_cut_keeps_turns_log_probs_and_what_stands_between(rollout: Rollout) -> None:
    before = len(rollout.sequence.prefix)
    cut = rollout.cut(4, "half")
    assert cut.sequence.tokens_L[before:].tolist() == [*TURNS[0], *SAID[0], TURNS[1][0]]
    assert cut.turn_A is not None
    assert cut.engine_logp_A is not None
    assert cut.turn_A.tolist() == [0, 0, 0, 1]
    assert cut.engine_logp_A.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert (cut.text, cut.status) == ("half", Status.TRUNCATED)
    assert rollout.cut(9, "no shorter") is rollout
    # At the end of a turn, what was answered to it goes too: nothing was decided from it.
    assert rollout.cut(3, "").sequence.tokens_L[before:].tolist() == TURNS[0]


@pytest.mark.parametrize(("turns", "logps"), [(8, 9), (9, 8)])
def test_turns_and_log_probs_are_one_for_each_decision(rollout: Rollout, turns: int, logps: int) -> None:
    with pytest.raises(ValueError, match="for 9 decided tokens"):
        Rollout(rollout.prompt, rollout.sequence, turn_A=torch.zeros(turns).long(), engine_logp_A=torch.zeros(logps))


class Reads:
    """Reads every prompt as the same tokens."""

    def __init__(self, lm: LanguageModel) -> None:
        self.tokenizer = lm.tokenizer

    def __call__(self, prompt: Prompt) -> TokenSequence:
        return TokenSequence.of(self.tokenizer(TEXT)["input_ids"])


def setup_of(lm: LanguageModel, prompts: Sequence[Prompt]) -> tuple[Sequence[Prompt], Any]:
    """The prompts of a run, and how they are read."""
    return prompts, Reads(lm)


def same(one: Rollout, two: Rollout) -> None:
    assert torch.equal(one.sequence.tokens_L, two.sequence.tokens_L)
    assert torch.equal(one.sequence.action_mask_L, two.sequence.action_mask_L)
    assert (one.turn_A is None) == (two.turn_A is None)
    assert one.turn_A is None or torch.equal(one.turn_A, two.turn_A)  # type: ignore[arg-type]


def test_replayed_visits_come_back_from_a_checkpoint_as_they_were(
    lm: LanguageModel, rollout: Rollout, tmp_path: Path
) -> None:
    ended = three_turns(rollout.sequence.prefix.tokens_L.tolist(), member=1).cut(4, "")
    visits = [(rollout, ended), (single(rollout.sequence.prefix.tokens_L.tolist()),)]
    setup, cache = setup_of(lm, [rollout.prompt, visits[1][0].prompt]), RolloutCache(tmp_path)
    cache.remember(visits, 9)
    again = RolloutCache(tmp_path)
    again.restore(*setup, cache.tensors(setup[0]))
    assert [len(visit) for visit in again.visits] == [2, 1]
    for before, after in zip(visits, again.visits, strict=True):
        for one, two in zip(before, after, strict=True):
            same(one, two)
            assert torch.equal(one.engine_logp_A, two.engine_logp_A)  # type: ignore[arg-type]
            assert (one.status, one.member, one.reward) == (two.status, two.member, two.reward)


def test_a_visit_that_began_otherwise_than_its_row_is_not_kept_as_if_it_had_not(
    lm: LanguageModel, rollout: Rollout, tmp_path: Path
) -> None:
    cache, row = RolloutCache(tmp_path), Prompt("p", (Message("user", "3 ="),))
    cache.remember([(rollout,)], 9)
    with pytest.raises(UserError, match=r"prompt 'p': its environment began with other messages"):
        cache.tensors([row])


def test_kept_answers_come_back_from_their_file_as_they_were(
    lm: LanguageModel, rollout: Rollout, tmp_path: Path
) -> None:
    kept = [rollout, single(rollout.sequence.prefix.tokens_L.tolist())]
    setup, plan = setup_of(lm, [own.prompt for own in kept]), RolloutPlan()
    RolloutCache(tmp_path).keep(kept, plan, 1)
    again = RolloutCache(tmp_path)
    again.go_back(*setup, 1)
    for one, two in zip(kept, again.completions.values(), strict=True):
        same(one, two)


@pytest.mark.parametrize("kind", ["replay", "kept"])
def test_media_between_turns_are_refused_where_they_would_be_lost(rollout: Rollout, tmp_path: Path, kind: str) -> None:
    shown = Rollout(rollout.prompt, rollout.sequence.then([30], media=(Media("x", 0),)).then([7], decided=True))
    with pytest.raises(UserError, match=r"prompt 'p': an image.*cannot be kept"):
        RolloutCache(tmp_path).remember([(shown,)], 1) if kind == "replay" else RolloutCache(tmp_path).keep(
            [shown], RolloutPlan(), 1
        )


def test_what_the_teacher_wrote_is_read_with_the_students_stops_turn_by_turn(
    lm: LanguageModel, rollout: Rollout
) -> None:
    writer = TeacherGenerator(
        HFEngine(lm, vocab=VOCAB, max_parallel=1),
        lambda prompt: [9, 9],
        alignment=SameIds(VOCAB, StopMap({STOP: OTHER, OTHER: STOP})),
        student_stops=StopTokens(frozenset({OTHER}), OTHER),
    )
    task = Task(rollout.prompt, TokenSequence.of([5, 6]), 0, UniformStream(0, "teacher"))
    read = writer.as_read(task, rollout)
    expected = [12, 13, OTHER, *SAID[0], 20, OTHER, *SAID[1], 7, 8, 9, OTHER]
    assert read.sequence.tokens_L.tolist() == [5, 6, *expected]
    assert torch.equal(read.sequence.action_mask_L[2:], rollout.sequence.continuation.action_mask_L)
    assert read.turn_A is not None
    assert read.turn_A.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    # A stop of the student's in the middle of a turn ends the rollout: the reply was to more than that.
    first = TokenSequence.of([9, 9]).then([12, 8, STOP], decided=True).then([30]).then([7, STOP], decided=True)
    writer = TeacherGenerator(
        writer.engine, lambda prompt: [9], alignment=SameIds(VOCAB), student_stops=StopTokens(frozenset({8}), 8)
    )
    early = writer.as_read(task, Rollout(rollout.prompt, first, turn_A=torch.tensor([0, 0, 0, 1, 1])))
    assert early.sequence.tokens_L.tolist() == [5, 6, 12, 8]
    assert early.turn_A is not None
    assert early.turn_A.tolist() == [0, 0]


def test_a_record_says_what_was_read_between_the_steps(lm: LanguageModel, rollout: Rollout) -> None:
    row = token_row(Pack.of([rollout]), 0, {"x": torch.arange(9.0)}, lm.tokenizer)
    assert row["ids"] == [token for ids in TURNS for token in ids]
    assert [(own["before"], own["ids"]) for own in row["between"]] == [(3, SAID[0]), (5, SAID[1])]
    assert row["columns"]["x"] == list(range(9))
    assert "between" not in token_row(Pack.of([single([5])]), 0, {}, lm.tokenizer)


def test_the_judge_compares_behind_all_that_was_read(lm: LanguageModel, rollout: Rollout) -> None:
    evaluator = Evaluator([], None, 1, 0, 8, 1.0, 1.0, VOCAB, 64, TemplateOptions(), 1.0)
    values, _ = evaluator._compare(lm, local(lm), [rollout])
    entropy_N = torch.distributions.Categorical(logits=own_logp(lm, [rollout.sequence])).entropy()
    torch.testing.assert_close(values["student_entropy"], entropy_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values["reverse_kl"], torch.zeros(9), rtol=0, atol=1e-5)


def test_trust_forces_tokens_behind_all_that_was_read(
    lm: LanguageModel, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TokenSequence] = []

    class Noting(HFEngine):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> Any:
            asked.extend(request.context for request in requests)
            return super().generate(requests, sampling)

    class Always:
        name = "always"

        def __call__(self, prompt: Prompt, text: str) -> float:
            return 1.0

    monkeypatch.setattr(trust, "_spine", lambda *more: [rollout])
    engine, own = Noting(lm, vocab=VOCAB, max_parallel=8), local(lm)
    student = trust.Student(engine, own, own.render, lm.stops, parallel=8)
    protocol = trust.Protocol(places=9, candidates=1, max_new_tokens=12)
    found = trust.branches(student, local(lm), View(), [rollout.prompt], ByText(Always()), protocol)
    assert len(found) == 9
    places = rollout.sequence.action_mask_L.nonzero().flatten().tolist()
    whole = rollout.sequence.tokens_L.tolist()
    read = {tuple(context.tokens_L.tolist()) for context in asked}
    assert {tuple(whole[:place]) for place in places} <= read
    assert all(list(ids[:-1]) == whole[: len(ids) - 1] for ids in read)


# --- media ---


def with_image(digest: str, *answer: int) -> TokenSequence:
    return TokenSequence.of([5, 6, 7], (Media(digest, 1),)).then(answer, decided=True)


def test_equal_placeholders_of_different_images_share_no_prompt() -> None:
    one, two, again = with_image("one", 8, 9), with_image("two", 8, 9), with_image("one", 9, 9, 9)
    assert len(Row.of([one, two], share=True, device=CPU).tokens_T) == 2 * 4
    assert len(Row.of([one, again], share=True, device=CPU).tokens_T) == 4 + 2
    # Each prompt is counted for every image, so that three do not fit where two of one image do.
    assert row_batches([one, again], 8, share=True) == [[0, 1]]
    assert row_batches([one, two], 8, share=True) == [[0], [1]]
    asked_B, different = read_once([one.prefix, two.prefix, again.prefix])
    assert asked_B.tolist() == [0, 1, 0]
    assert [context.media[0].digest for context in different] == ["one", "two"]


def test_a_model_of_text_refuses_media(lm: LanguageModel) -> None:
    sequence = with_image("one", 8)
    engine = HFEngine(lm, vocab=VOCAB, max_parallel=1)
    rollout = Rollout(Prompt("p", (Message("user", TEXT),)), sequence)
    asks: list[Callable[[], Any]] = [
        lambda: lm.hidden([sequence]),
        lambda: lm.all_hidden([sequence], 8),
        lambda: engine.generate([Request(sequence.prefix, uniforms(0, "x", count=2))], Sampling(2)),
        # The teacher renders the prompt itself: an image that it would not see must not vanish.
        lambda: local(lm).score([(rollout,)], ScoreRequest(View(), frozenset({SAMPLED}))),
    ]
    for ask in asks:
        with pytest.raises(UserError, match=r"holds an image, a sound or a video.*model of text alone"):
            ask()
