"""Texts that are written before a teacher scores: by whom, with whose weights, the same however batches are cut."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from players import make_player

from retort import config as configuration
from retort import registry
from retort.core.passages import Passage
from retort.core.rollouts import Group, Rollout
from retort.core.sequences import TokenSequence
from retort.core.steps import Clock
from retort.errors import UserError
from retort.ranks import World
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.train import runner
from retort.train.setup.prepare import Prepared, prepare
from retort.train.teaching.drafting import Drafting


class Heard:
    """An engine that notes down what it is asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seen = engine, list[Request]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.seen += requests
        return self.engine.generate(requests, sampling)


@pytest.fixture
def debaters(tiny_run: dict[str, Any]) -> Prepared:
    return pipeline.prepared(tiny_run, "mad_opd", samples=2)


def groups(setup: Prepared, words: str = "7 + 2", visit: int = 0) -> list[Group]:
    """Two completions of each of three prompts, all with the same words."""
    ids = setup.student.tokenizer.encode(words, add_special_tokens=False)

    def rollout(place: int, member: int) -> Rollout:
        prompt = setup.source.prompts[place]
        sequence = TokenSequence.of(setup.source.render(prompt).ids).then(ids, decided=True)
        return Rollout(prompt, (sequence,), member=member, visit=visit, text=words, reward=float(member))

    return [tuple(rollout(place, member) for member in range(2)) for place in range(3)]


def texts(found: Sequence[Group]) -> list[list[tuple[Passage, ...]]]:
    return [[rollout.passages for rollout in group] for group in found]


def drafting(setup: Prepared) -> Drafting:
    assert setup.teachers.drafting is not None
    return setup.teachers.drafting


def test_all_teachers_speak_in_every_round_and_siblings_share_one_debate(debaters: Prepared) -> None:
    found = debaters.teachers.with_passages(debaters.method, groups(debaters))
    for group in found:
        first, second = (rollout.passages for rollout in group)
        assert first == second
        assert [(own.author, own.model, own.round) for own in first] == [
            (0, "teacher", 0),
            (1, "teacher_2", 0),
            (0, "teacher", 1),
            (1, "teacher_2", 1),
        ]
    assert len({group[0].passages for group in found}) == 3, "each prompt has a debate of its own"
    again = debaters.teachers.with_passages(debaters.method, groups(debaters, visit=1))
    assert texts(again) != texts(found), "so has each visit"


def test_a_text_depends_on_its_own_prompt_alone_and_on_no_word_of_the_student(debaters: Prepared) -> None:
    whole, method = groups(debaters), debaters.method
    found = debaters.teachers.with_passages(method, whole)
    assert debaters.teachers.with_passages(method, whole[::-1]) == found[::-1]
    assert [debaters.teachers.with_passages(method, [own])[0] for own in whole] == found
    others = groups(debaters, "no 9 no 9")
    assert texts(debaters.teachers.with_passages(method, others)) == texts(found)


def test_no_token_of_the_student_is_in_what_the_debaters_read(debaters: Prepared) -> None:
    heard = {name: replace(own, engine=Heard(own.engine)) for name, own in drafting(debaters).drafters.items()}
    own = replace(drafting(debaters), drafters=heard)
    own.passages(debaters.method, groups(debaters, "7 7 7 7 7 7 7 7"))
    ids = debaters.student.tokenizer.encode("7 7 7 7 7 7 7 7", add_special_tokens=False)
    read = [request.context.tokens_L.tolist() for one in heard.values() for request in one.engine.seen]
    assert len(read) == 3 * 2 * 2, "prompts, teachers, rounds"
    assert not any(tokens[start : start + len(ids)] == ids for tokens in read for start in range(len(tokens)))
    second = read[-1]
    assert len(second) > len(read[0]), "the second round has the first in sight"


def test_two_ranks_write_what_one_writes(debaters: Prepared) -> None:
    lock, gate, board, found = threading.Lock(), threading.Barrier(2), [None, None], [None, None]

    class Thread(World):
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, 2

        def each(self, work: Callable[[], Any]) -> list[Any]:
            with lock:
                board[self.rank] = work()
            gate.wait(timeout=60)
            own = list(board)
            gate.wait(timeout=60)
            return own

    def run(rank: int) -> None:
        found[rank] = replace(drafting(debaters), world=Thread(rank)).passages(debaters.method, groups(debaters))  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = debaters.teachers.with_passages(debaters.method, groups(debaters))
    assert texts(found[0] or []) == texts(found[1] or []) == texts(alone)


def test_a_run_records_what_was_said_and_how_sure_each_teacher_was(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    more = {"method": {"name": "mad_opd", "rounds": 1}, "steps": 1, "eval": {"problems": 0}}
    settings = pipeline.for_method(tiny_run, registry.load("mad_opd"))
    with pipeline.models_once():
        runner.start(configuration.resolve(configuration.merge(settings, more)), tmp_path).go()
    row = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])
    assert [(own["model"], own["round"]) for own in row["passages"]] == [("teacher", 0), ("teacher_2", 0)]
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["weight"] == pytest.approx(0.5)
    assert metrics["view/teacher/shows/discussion"] > 0
    assert {"loss/teacher", "loss/teacher_2"} <= metrics.keys()


@pytest.mark.parametrize(("weights", "moves"), [("frozen", False), ("live", True)])
def test_a_self_teacher_writes_with_the_weights_with_which_it_scores(
    tiny_run: dict[str, Any], weights: str, moves: bool
) -> None:
    setup = pipeline.prepared(tiny_run, "opsd", reason_first=True, weights=weights)
    before = texts(setup.teachers.with_passages(setup.method, groups(setup)))
    assert all(len(own) == 1 and own[0].model == "student" for group in before for own in group)
    with torch.no_grad():
        for number, parameter in enumerate(setup.student.trainable().values()):
            draw = torch.Generator().manual_seed(number)
            parameter += torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    assert setup.teachers.own is not None
    setup.teachers.own.moved(1)
    now = texts(setup.teachers.with_passages(setup.method, groups(setup)))
    assert (now != before) is moves


def test_a_rationale_is_in_the_prompt_that_the_teacher_reads(tiny_run: dict[str, Any]) -> None:
    setup = pipeline.prepared(tiny_run, "opsd", reason_first=True)
    (one, *_) = setup.teachers.with_passages(setup.method, groups(setup))
    said = replace(one[0], passages=(replace(one[0].passages[0], text="9 9 9"),))
    bare = replace(said, passages=())
    teacher: Any = setup.teachers.models["student"]
    view = setup.method.views["teacher"]
    with_it, without = (len(teacher.local.read([(own,)], view).sequences[0][0]) for own in (said, bare))
    assert with_it > without


def test_completions_written_under_the_teachers_prompt_follow_the_students_own(tiny_run: dict[str, Any]) -> None:
    setup = pipeline.prepared(tiny_run, "sdft", generate_from_teacher=True, samples=2, shows=("solution",))
    source = setup.source
    source.engine = heard = Heard(source.engine)
    found = source.rollouts(setup.method, Clock(), 0)
    view = setup.method.views["teacher"]
    for group in found:
        for rollout in group:
            own = source.render(rollout.prompt).ids
            assert rollout.prefix_ids == own
            assert rollout.engine_logp_A is None
            assert source.shown is not None
            under = source.shown(view, rollout.prompt, rollout.visit, source.limit)
            assert under is not None
            assert len(under) > len(own)
            assert any(request.context.tokens_L.tolist() == under.ids for request in heard.seen)
    plain = pipeline.prepared(tiny_run, "sdft", samples=2, shows=("solution",))
    others = plain.source.rollouts(plain.method, Clock(), 0)
    assert [r.action_ids for g in found for r in g] != [r.action_ids for g in others for r in g]


def test_teachers_debate_every_turn_of_an_episode(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"three {number}"}) + "\n" for number in range(8))
    )
    settings = {
        "student": str(make_player(tmp_path / "student", seed=1)),
        "teacher": str(make_player(tmp_path / "teacher", seed=2, hidden_size=24)),
        "models": {"teacher_2": {"path": str(make_player(tmp_path / "other", seed=3))}},
        "method": {"name": "opad", "rounds": 1, "debate_tokens": 4},
        "data": str(tmp_path / "data.jsonl"),
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "steps": 1,
        "rollout": {"prompts": 4, "max_new_tokens": 24, "env": "players:Walk"},
        "eval": {"problems": 0},
        "record": {"rollouts": 99},
    }
    with pytest.raises(UserError, match=r"set rollout\.history"):
        prepare(configuration.resolve(settings))
    own = configuration.merge(settings, {"rollout": {"history": 3}})
    runner.start(configuration.resolve(own), tmp_path / "run").go()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        turns = max(row.get("turns", [0])) + 1
        assert sorted({said.get("step") for said in row["passages"]}) == list(range(turns))
        assert len(row["passages"]) == 2 * turns
    assert any(max(row["turns"]) > 0 for row in rows)


def test_who_is_to_write_and_cannot_is_refused_in_one_line(tiny_run: dict[str, Any]) -> None:
    named = pipeline.for_method(tiny_run, registry.load("mad_opd"))

    def refused(message: str, settings: dict[str, Any], **more: Any) -> None:
        own = configuration.merge(settings, {"method": {"name": "mad_opd"}, "eval": {"problems": 0}, **more})
        with pytest.raises(UserError, match=message) as caught:
            prepare(configuration.resolve(own))
        assert "\n" not in str(caught.value)

    refused(r"name it with models\.teacher_2\.path", tiny_run)
    refused("teach", {name: value for name, value in named.items() if name != "teacher"})
    refused("only=true does not load them", named, cache={"dir": "scores", "only": True})
