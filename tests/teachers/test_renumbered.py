"""A teacher with the same tokens under other ids: what it says and writes is what it would with the student's ids."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import WORDS, make_tokenizer
from tokenizers import normalizers

from retort import api
from retort.align import check_same_tokenizer
from retort.align.pair import IdMap, SameIds, align_pair
from retort.core.needs import DENSE, ENTROPY, SAMPLED, Need
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Message, Pack, Prompt, Rollout, Status, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.errors import UserError
from retort.models.load import load_model
from retort.preflight.doctor import examine_setup
from retort.rollout.by_teacher import TeacherGenerator
from retort.rollout.engines.base import Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.episodes import Task
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View
from retort.train import runner
from retort.train.models.precision import measured

PROMPT = Prompt("p", (Message("user", "3 + 4 ="),))
CLOCK = re.compile(r"time/|tokens_per_second").match
ASKED = {"sampled": SAMPLED, "topk": Need("topk", 5), "entropy": ENTROPY, "dense": DENSE, "hidden": Need("hidden")}


def loaded(folder: Path, role: str, **more: Any) -> Any:
    return load_model(str(folder), role=role, precision="fp32", device=torch.device("cpu"), **more)


@pytest.fixture(scope="module")
def student(model_folder: Callable[..., Path]) -> Any:
    return loaded(model_folder(seed=1), "student")


@pytest.fixture(scope="module", params=["<eos>", "<|im_end|>"], ids=["one stop", "another stop"])
def pair(request: pytest.FixtureRequest, model_folder: Callable[..., Path], student: Any) -> tuple[Any, Any]:
    """The same teacher with the student's ids and with others."""
    same, other = (model_folder(seed=2, padded_to=80, eos=request.param, renumbered=seed) for seed in (None, 5))
    return tuple(
        LocalTeacher(lm, alignment=align_pair(student, lm), batch_tokens=64)
        for lm in (loaded(same, "teacher"), loaded(other, "teacher"))
    )


def values(signal: Any) -> dict[str, torch.Tensor]:
    """All numbers of a signal by name."""
    if isinstance(signal, Dense):
        assert signal.hidden is not None
        return {"logits": signal.logits(slice(None)), "hidden": signal.hidden(slice(None))}
    each = {one.name: getattr(signal, one.name) for one in dataclasses.fields(signal)}
    return {name: value for name, value in each.items() if isinstance(value, torch.Tensor)}


def test_it_is_known_for_what_it_is(pair: tuple[Any, Any], student: Any) -> None:
    same, other = (teacher.alignment for teacher in pair)
    assert isinstance(same, SameIds) and isinstance(other, IdMap)
    assert (same.vocab, dict(same.stops)) == (other.vocab, dict(other.stops))
    assert "tokens have another id for the teacher" in other.describe(student.tokenizer, pair[1].lm.tokenizer)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_signals_are_the_very_same(pair: tuple[Any, Any], student: Any, asked: str, temperature: float) -> None:
    ids = student.tokenizer("3 + 4 =")["input_ids"]
    stop = student.stops.primary
    asked_for = TokenSequence.of(ids)
    wrote = [asked_for.then(actions, decided=True) for actions in ([12, 13, stop], [7], [20, 4, stop])]
    wrote.append(wrote[0].then([8, 2, 4, 30]).then([9, stop], decided=True))  # an environment spoke in between
    pack = Pack.of([Rollout(PROMPT, sequence) for sequence in wrote])
    expected, found = (
        values(teacher.score(in_groups(pack.rollouts), ScoreRequest(View(), frozenset({ASKED[asked]}), temperature)))
        for teacher in pair
    )
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_what_it_writes_is_in_the_students_ids(pair: tuple[Any, Any], student: Any) -> None:
    rollouts: list[list[Rollout]] = []
    for teacher in pair:
        engine = HFEngine(teacher.lm, vocab=teacher.alignment.width, max_parallel=4)
        writer = TeacherGenerator(engine, teacher.render, alignment=teacher.alignment, student_stops=student.stops)
        ids = student.tokenizer("3 + 4 =")["input_ids"]
        tasks = [
            Task(PROMPT, TokenSequence.of(ids), member, UniformStream(0, "teacher", member)) for member in range(6)
        ]
        # A nucleus this small holds one token: the order in which a model numbers tokens decides nothing.
        rollouts.append(writer.generate(tasks, Sampling(8, 1.0, 1e-6)))
    same, other = rollouts
    assert [r.sequence.tokens_L.tolist() for r in other] == [r.sequence.tokens_L.tolist() for r in same]
    assert [(r.status, r.text) for r in other] == [(r.status, r.text) for r in same]


def test_a_run_with_it_is_the_run_without(
    tiny_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[list[dict[str, Any]]] = []
    checks: list[dict[str, Any]] = []
    for place, renumbered in enumerate((None, 5)):
        folder = model_folder(seed=2, hidden_size=24, padded_to=64, eos="<|im_end|>", renumbered=renumbered)
        settings = api.assemble({**tiny_run, "teacher": str(folder), "steps": 2}, {"method": "eopd"})
        run = runner.start(settings, tmp_path / str(place))
        checks.append({check.name: check for check in examine_setup(run.prepared, quick=True).checks})
        assert isinstance(run.prepared.teachers.behind(run.prepared.method)["teacher"].alignment, IdMap) == (
            renumbered is not None
        )
        run.go()
        lines = (tmp_path / str(place) / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if not CLOCK(k)} for line in lines])
    assert rows[0] and rows[0] == rows[1]
    same, other = checks
    for name in ("special tokens", "chat template", "prompt's end", "prompts", "teacher is loaded", "teacher repeats"):
        assert other[name] == same[name], name
    assert other["stop token"].verdict == same["stop token"].verdict
    assert "tokens have other ids for the teacher" in other["tokenizer"].line


def test_what_bf16_rounds_away_is_measured_alike(model_folder: Callable[..., Path], student: Any) -> None:
    prompts = [TokenSequence.of(student.tokenizer("3 + 4 =")["input_ids"])]
    learner, same, other = (
        load_model(str(model_folder(**one)), role=role, precision="bf16", device=torch.device("cpu"))
        for role, one in (
            ("student", {"seed": 1}),
            ("teacher", {"seed": 2, "padded_to": 80, "eos": "<|im_end|>", "renumbered": None}),
            ("teacher", {"seed": 2, "padded_to": 80, "eos": "<|im_end|>", "renumbered": 5}),
        )
    )
    assert measured(learner, same, prompts, 0) == measured(learner, other, prompts, 0)


def test_ids_that_are_nobodys_and_other_cuts_are_refused_as_before(student: Any) -> None:
    def model(tokenizer: Any) -> Any:
        return dataclasses.replace(student, tokenizer=tokenizer)

    for other in (
        make_tokenizer(words=[*WORDS[:-1], "more"], renumbered=5),  # another token
        make_tokenizer(words=[*WORDS, "more"], renumbered=5),  # one more
    ):
        with pytest.raises(UserError) as said:
            align_pair(student, model(other))
        with pytest.raises(UserError) as before:
            check_same_tokenizer(student.tokenizer, other)
        assert str(said.value) == str(before.value)
    digits = make_tokenizer(renumbered=5)  # the same tokens, but another reading of texts
    digits.backend_tokenizer.normalizer = normalizers.Replace("2", "3")
    with pytest.raises(UserError, match="different tokenizers"):
        align_pair(student, model(digits))


def test_an_episode_of_the_teachers_is_in_the_students_ids_whole(pair: tuple[Any, Any], student: Any) -> None:
    """Turns of the teacher's with its stop at their ends, and what was said in between, without."""
    student_ids = student.tokenizer("3 + 4 =")["input_ids"]
    read: list[Rollout] = []
    for teacher in pair:
        own = teacher.lm.tokenizer.convert_tokens_to_ids
        stop, engine = teacher.lm.stops.primary, HFEngine(teacher.lm, vocab=teacher.alignment.width, max_parallel=4)
        writer = TeacherGenerator(engine, teacher.render, alignment=teacher.alignment, student_stops=student.stops)
        wrote = TokenSequence.of(own(["so", "is"])).then([*own(["7", "+"]), stop], decided=True)
        wrote = wrote.then(own(["<eos>", "from"])).then(own(["9"]), decided=True)
        task = Task(PROMPT, TokenSequence.of(student_ids), 0, UniformStream(0, "teacher"))
        read.append(writer.as_read(task, Rollout(PROMPT, wrote, status=Status.TRUNCATED)))
    same, other = (rollout.sequence for rollout in read)
    expected = ["7", "+", "<eos>", "<eos>", "from", "9"]
    assert student.tokenizer.convert_ids_to_tokens(other.tokens_L[len(student_ids) :].tolist()) == expected
    assert torch.equal(same.tokens_L, other.tokens_L) and torch.equal(same.action_mask_L, other.action_mask_L)
