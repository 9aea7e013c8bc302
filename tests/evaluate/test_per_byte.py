"""Nats per byte between a model and its teacher: what slow passes give, whichever tokenizers the two have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ScriptedEngine
from teachers.test_spanned import Made, loaded, slowly
from train.storage.test_survival import go
from trained import make_model_of

from retort.align.chat import TemplateOptions, render
from retort.align.pair import SameIds
from retort.align.pieces import pieces
from retort.align.spanned import align_spans
from retort.cli import main
from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import SignalError
from retort.evaluate import per_byte
from retort.evaluate.evaluator import Evaluator
from retort.evaluate.passk import Estimate
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher

ASKED = {"hello": " lazy dog; it's 3:45 p.m.", "a b c": "the answer is the fox", "def f(x):": "", "the": " Größe ł"}
PROMPTS = [Prompt(text, (Message("user", text),)) for text in ASKED]
LONGEST = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    lms: dict[tuple[str, int], Any] = {}

    def make(student: str, teacher: str) -> Made:
        for kind, seed in ((student, 1), (teacher, 2)):
            if (kind, seed) not in lms:
                lms[kind, seed] = loaded(tmp_path_factory.mktemp("model"), kind, seed)
        ours, theirs = lms[student, 1], lms[teacher, 2]
        return Made(ours, SpanTeacher(theirs, alignment=align_spans(ours, theirs, "it"), batch_tokens=32))

    return make


def answers(pair: Made) -> dict[str, list[int]]:
    return {asked: pair.spelt(text) for asked, text in ASKED.items()}


def row(pair: Made, teacher: Any, said: dict[str, list[int]], **changes: Any) -> dict[str, Any]:
    """What the evaluator says where the student answers with these ids."""
    lm = pair.student
    by_context = {tuple(render(one, lm.tokenizer, TemplateOptions())): said[one.id] for one in PROMPTS}
    engine = ScriptedEngine(
        lm.tokenizer,
        lm.stops.primary,
        torch.zeros(pair.pair.vocab),
        says=lambda request: by_context[tuple(request.context.tokens_L.tolist())],
    )
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, **changes}
    evaluator = Evaluator(
        PROMPTS, None, 1, 0, LONGEST, vocab=pair.pair.vocab, batch_tokens=64, template_options=TemplateOptions(),
        threshold=0.8, recorded=len(PROMPTS), **settings,
    )  # fmt: skip
    return evaluator.evaluate(lm, engine, teacher=teacher)


def by_hand(pair: Made, said: dict[str, list[int]]) -> tuple[Estimate | None, list[float], list[float]]:
    """The estimate; and the bytes of each completion, in units and in all."""
    sums, inside, whole = list[float](), list[float](), list[float]()
    for prompt in PROMPTS:
        before, ids = render(prompt, pair.student.tokenizer, TemplateOptions()), said[prompt.id]
        text = pieces(pair.student.tokenizer, ids, before, stops=pair.student.stops.ids)
        lengths = [0 if piece.startswith(b"\xff<") else len(piece) for piece in text]
        with torch.no_grad():
            logits = pair.student.model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
        logp = logits[:, : pair.pair.vocab].log_softmax(-1)[range(len(ids)), ids]
        rollout = Rollout(prompt, TokenSequence.of(before).then(ids, decided=True), member=0)
        units = slowly(pair, rollout, pair.teacher.render(prompt).ids)
        sums.append(sum(float(logp[unit.own].sum()) - unit.logp for unit in units))
        inside.append(float(sum(lengths[step] for unit in units for step in unit.own)))
        whole.append(float(sum(lengths)))
    return Estimate.ratio(sums, inside), inside, whole


@pytest.mark.parametrize(("student", "teacher"), [("byte-level", "unigram"), ("llama", "gemma"), ("gemma", "bert")])
def test_it_is_that_of_slow_passes(made: Callable[..., Made], student: str, teacher: str) -> None:
    pair = made(student, teacher)
    said = answers(pair)
    found = row(pair, pair.teacher, said)
    estimate, inside, whole = by_hand(pair, said)
    assert estimate is not None
    assert found["reverse_kl_per_byte"] == pytest.approx(estimate.plain(), abs=1e-9)
    share = Estimate.share(inside, whole)
    assert share is not None
    assert found["bytes_in_units"] == pytest.approx(share.plain())
    assert sum(whole) == len("".join(ASKED.values()).encode())
    assert "reverse_kl" not in found
    assert all(len(columns["sampled_reverse_kl"]) for columns in (answer["columns"] for answer in found["answers"]))


def test_what_the_teacher_cannot_read_is_in_neither_number(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "unigram")
    said = answers(pair)
    before = by_hand(pair, said)
    cut = {**said, "the": said["the"][:-2]}  # without the stop and the last byte of ł
    cut["the"] += [cut["the"][-1]] * (LONGEST - len(cut["the"]))
    found = row(pair, pair.teacher, cut)
    assert found["bytes_in_units"]["value"] < sum(before[1]) / sum(before[2])


def test_with_one_tokenizer_every_token_is_a_unit(made: Callable[..., Made]) -> None:
    pair = made("byte-level", "byte-level")
    said = answers(pair)
    dense = LocalTeacher(pair.teacher.lm, alignment=SameIds(pair.pair.width), batch_tokens=32)
    by_ids, by_units = row(pair, dense, said), row(pair, pair.teacher, said)
    assert by_ids["reverse_kl_per_byte"] == pytest.approx(by_units["reverse_kl_per_byte"], abs=1e-9)
    assert by_ids["reverse_kl"]["value"] > 0
    assert by_units["bytes_in_units"]["value"] == 1.0
    assert "bytes_in_units" not in by_ids


def test_a_teacher_that_is_the_student_is_at_no_distance(made: Callable[..., Made]) -> None:
    pair = made("gemma", "bert")
    itself = SpanTeacher(pair.student, alignment=align_spans(pair.student, pair.student, "it"), batch_tokens=32)
    found = row(pair, itself, answers(pair))
    assert found["reverse_kl_per_byte"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-9)


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_answers_drawn_otherwise_estimate_nothing(made: Callable[..., Made], changes: dict[str, float]) -> None:
    pair = made("gemma", "bert")
    found = row(pair, pair.teacher, answers(pair), **changes)
    assert "reverse_kl_per_byte" not in found
    assert found["bytes_in_units"]["value"] > 0


def test_bytes_of_tokens(made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that is text spells none; where a tokenizer does not say, a completion is left out of both sums."""
    pair = made("byte-level", "unigram")
    prompt = PROMPTS[0]
    rollouts = [pair.rollout(pair.spelt("a łl")), pair.rollout(pair.spelt("fox", stop=False))]
    pack = Pack.of([dataclasses.replace(one, prompt=prompt) for one in rollouts])
    counts = per_byte.byte_counts(pack, pair.student)
    assert counts[: rollouts[0].steps].sum() == len("a łl".encode())
    assert counts[rollouts[0].steps - 1] == 0
    assert counts[rollouts[0].steps :].sum() == 3

    def refused(tokenizer: Any, ids: Sequence[int], before: Sequence[int]) -> list[bytes]:
        if len(ids) == rollouts[0].steps:
            raise SignalError("not known")
        return pieces(tokenizer, ids, before)

    monkeypatch.setattr(per_byte, "pieces", refused)
    some = per_byte.byte_counts(pack, pair.student)
    assert some[: rollouts[0].steps].isnan().all()
    logps = {"student_logp": torch.full((len(pack),), -1.0), "teacher_logp": torch.full((len(pack),), -3.0)}
    above, below = per_byte.ratios(logps, some, as_drawn=True)["reverse_kl_per_byte"]
    assert (float(above.sum()), float(below.sum())) == (2.0 * rollouts[1].steps, 3.0)


def test_a_run_and_the_command_give_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher generates in all of its own ids, of which it has others than the student."""
    student, teacher = (
        str(make_model_of(tmp_path / kind, kind, seed=seed, scale=0.1))
        for seed, kind in enumerate(("byte-level", "gemma"))
    )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the fox", "a b", "hello", "x y", "dog")))
    settings: dict[str, Any] = {
        "student": student, "teacher": teacher, "data": str(data), "precision": "fp32", "device": "cpu",
        "checks": "skip", "steps": 1, "method": {"name": "strict_ct"}, "rollout": {"prompts": 2, "max_new_tokens": 6},
        "eval": {"problems": 2, "samples": 2, "data": str(data)}, "checkpoint": {"every": 1},
    }  # fmt: skip
    go(settings, tmp_path / "run")
    table = json.loads((tmp_path / "run/eval.json").read_text())
    before, after, own = table["rows"]
    for cells in (before, after):
        assert {"value", "low", "high"} == set(cells["reverse_kl_per_byte"])
        assert 0 < cells["bytes_in_units"]["value"] <= 1
    assert own["who"] == "teacher"
    assert "reverse_kl" not in own
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert " nats a byte" in page
    assert "Bytes that the teacher scores" in page
    capsys.readouterr()
    words = ["eval", str(tmp_path / "run/model"), "--data", str(data), "--teacher", teacher, "--json"]
    words += ["precision=fp32", "device=cpu", "problems=2", "samples=2", "max_new_tokens=6"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]
    assert found["reverse_kl_per_byte"] == pytest.approx(after["reverse_kl_per_byte"], abs=1e-4)
    assert main([*words, "temperature=0.5"]) == 0
    said = capsys.readouterr()
    assert "reverse_kl_per_byte" not in json.loads(said.out)["rows"][0]
    assert "temperature=1 and top_p=1" in " ".join(said.err.split())
