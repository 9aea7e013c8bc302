"""Whole runs of a student and a teacher with two tokenizers: they learn, are recorded, and resume bit by bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from train.storage.test_survival import changed, go, lines, weights
from trained import make_model_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import retort
from retort import Stop, api
from retort import config as configuration
from retort.align.pieces import shown_pieces
from retort.align.retokenize import retokenize
from retort.align.tokens import OtherTokenizer
from retort.core.rollouts import Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.preflight.doctor import examine
from retort.preflight.spans import check_units
from retort.preflight.supervision import check_supervision, unit_positions
from retort.registry import for_two_tokenizers
from retort.teachers.spanned import SpanTeacher
from retort.train import runner
from retort.train.models import loading
from retort.train.setup.prepare import Prepared, prepare

pytestmark = pytest.mark.usefixtures("models_kept")

PROMPTS = ["the quick brown fox", "hello world", "a b c d e", "def f(x):"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": prompt, "response": " the fox", "answer": "fox"} for prompt in PROMPTS * 3]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": str(make_model_of(folder / "student", "gemma", seed=1, scale=0.1)),
        "teacher": str(make_model_of(folder / "teacher", "byte-level", seed=2, width=24)),
        "data": str(folder / "data.jsonl"),
        "precision": "fp32",
        "device": "cpu",
        "checks": "skip",
        "rollout": {"prompts": 4, "max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant"},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
    }


@pytest.mark.parametrize(("name", "metric"), [("strict_ct", "loss"), ("simct", "loss"), ("opd", None), ("exopd", None)])
def test_a_run_lowers_what_it_is_to_lower(
    settings: dict[str, Any], tmp_path: Path, name: str, metric: str | None
) -> None:
    """`exopd` adds a base model, the student's own beginning, read in the teacher's units; sampled values are noisy."""
    own = changed(settings, method={"name": name}, steps=14 if metric else 3)
    go(own, tmp_path / "run")
    rows = lines(tmp_path / "run")
    for row in rows:
        shares = [row[f"view/teacher/{part}"] for part in ("one_to_one", "spans", "unread")]
        assert sum(shares) == pytest.approx(1.0)
        assert shares[0] > 0
        assert row["grad_norm"] > 0
    if metric:
        before, after = (sum(row[metric] for row in part) / 4 for part in (rows[:4], rows[-4:]))
        assert after < before, (before, after)


class Stopping:
    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> Stop | None:
        return Stop("enough") if run.step == 2 else None


@pytest.mark.parametrize("name", ["strict_ct", "opd"])
def test_a_run_with_a_cold_start_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The first step learns from answers of the teacher's, in the student's tokens, up to bytes that are no text."""
    more = {
        "cold_start": {"steps": 1, "attempts": None},
        "rollout": {"max_new_tokens": 60},
        "optimizer": {"updates": 2},
    }
    own = changed(settings, method={"name": name}, steps=4, checkpoint={"every": 1}, **more)
    go(own, tmp_path / "whole")
    stopped = runner.start(configuration.resolve(own), tmp_path / "stopped")
    stopped.callbacks = (Stopping(),)
    stopped.go()
    runner.resume(tmp_path / "stopped").go()
    assert lines(tmp_path / "whole") == lines(tmp_path / "stopped")
    ours, theirs = (weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert lines(tmp_path / "whole")[0]["view/teacher/unread"] == 0, "the teacher reads all that it generated"


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ({"name": "gkd"}, "method 'gkd' needs .* of the teacher, but"),
        ({"name": "eopd"}, "method 'eopd' needs .* of the teacher, but"),
    ],
)
def test_methods_that_compare_ids_are_refused_before_any_run_loads_a_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], needs: str
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=needs) as refused:
        prepare(configuration.resolve(changed(settings, method=method)))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"or a method for two tokenizers: {', '.join(for_two_tokenizers())}")
    assert not isinstance(refused.value, OtherTokenizer)


def test_the_default_method_follows_from_the_tokenizers(settings: dict[str, Any], tmp_path: Path) -> None:
    two = configuration.DEFAULT_FOR_TWO_TOKENIZERS
    assert two in for_two_tokenizers()
    prepare(assembled := api.assemble(settings))  # nothing that it asks of the teacher is refused
    assert assembled.method["name"] == two
    assert api.assemble(settings, {"method": {"samples": 3}}).method["samples"] == 3
    assert api.assemble(settings, {"method": {"name": "opd"}}).method["name"] == "opd"
    one = changed(settings, teacher=str(make_model_of(tmp_path / "teacher", "gemma", seed=3)))
    for others in (one, changed(settings, teacher=str(tmp_path / "missing")), {"data": settings["data"]}):
        assert api.assemble(others).method["name"] == configuration.DEFAULT_METHOD
    with pytest.raises(UserError, match="no model folder at|missing"):
        prepare(api.assemble(changed(settings, teacher=str(tmp_path / "missing"))))


def test_the_default_method_of_models_in_memory(settings: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = (
        (AutoModelForCausalLM.from_pretrained(settings[role]), AutoTokenizer.from_pretrained(settings[role]))
        for role in ("student", "teacher")
    )
    others = {name: value for name, value in settings.items() if name not in ("student", "teacher")}
    out = tmp_path / "run"
    run = retort.distill(student=student, teacher=teacher, settings=others, steps=1, out=out, quiet=True)
    assert run.prepared.config.method["name"] == configuration.DEFAULT_FOR_TWO_TOKENIZERS
    assert lines(out)[0]["view/teacher/one_to_one"] > 0


def test_the_doctor_says_what_both_have_in_common(settings: dict[str, Any]) -> None:
    own = changed(settings, method={"name": "strict_ct"})
    found = examine(configuration.resolve(own))
    assert found["tokenizer"].verdict == "ok"
    assert "method 'strict_ct' compares units of the same bytes" in found["tokenizer"].saw
    assert "bytes of the data's answers" in found["units"].saw
    values = dict(found["units"].values)
    assert values["one_to_one"] + values["spans"] + values["unread"] == pytest.approx(1.0)
    assert values["shared"] > 100
    assert found["stop token"].verdict == found["chat template"].verdict == "ok"
    assert "nats a token" in found["teacher is loaded"].saw
    assert found["teacher repeats"].verdict == "ok"
    refused = examine(configuration.resolve(changed(settings, method={"name": "gkd"})))
    assert refused["tokenizer"].verdict == "fatal"
    assert "method 'gkd' needs" in refused["tokenizer"].saw
    assert refused["tokenizer"].remedy.endswith(f"a method for two tokenizers: {', '.join(for_two_tokenizers())}")


def test_the_doctor_counts_units_and_what_each_method_loses(settings: dict[str, Any]) -> None:
    prepared = prepare(configuration.resolve(changed(settings, method={"name": "strict_ct"})))
    teacher = prepared.teachers.models["teacher"]
    assert isinstance(teacher, SpanTeacher)
    units = check_units(prepared, teacher)
    values = dict(units.values)
    shapes = {name.removeprefix("units/"): count for name, count in values.items() if name.startswith("units/")}
    assert units.table[0][0] == "units"
    assert [row[2] for row in units.table[1:]] == list(shapes)
    assert sum(shapes.values()) == sum(float(row[0]) for row in units.table[1:])
    assert 0 < values["lacking/student_ids"] < 1
    answer = retokenize(prepared.student.tokenizer, " the fox").ids  # that of all rows
    partners = set(teacher.pair.shared.student_K.tolist())
    assert values["lacking/student_tokens"] == sum(token not in partners for token in answer) / len(answer)

    texts = [" the fox", "2+2=4, Größe", "def f(x):\n\treturn"]
    rollouts = [_written(prepared, text) for text in texts]
    found = unit_positions(teacher, prepared.student.tokenizer, rollouts)
    assert found.all_bytes == sum(len(text.encode()) for text in texts)
    assert found.all_tokens == sum(rollout.steps for rollout in rollouts)
    check = check_supervision(prepared.method, found)
    lost = dict(check.values)
    assert {name.partition("/")[0] for name in lost} == set(for_two_tokenizers())
    matched = sum(count for (shape, _), count in found.tokens.items() if shape.matched)
    assert 0 < matched < found.all_tokens
    assert lost["strict_ct/tokens"] == pytest.approx(1 - matched / found.all_tokens)
    outside = found.outside[0] / found.all_tokens
    assert lost["opd/tokens"] == lost["simct/tokens"] == pytest.approx(outside)
    assert lost["opd/tokens"] <= lost["uld/tokens"] <= lost["strict_ct/tokens"]
    read = sum(_read(teacher, rollout) for rollout in rollouts)
    assert read < found.all_tokens - found.outside[0], "tabs, or what ends inside of a later token"
    assert lost["bpm/tokens"] == pytest.approx(1 - read / found.all_tokens)
    assert check.table[0] == ("tokens", "bytes", "method")


def _read(teacher: SpanTeacher, rollout: Rollout) -> int:
    """Number of tokens at which `bpm` has something to compare; a stop is one."""
    (sequence,), table, read = rollout.sequences, teacher.pair.prefixes, 0
    units, stops = teacher.pair.units(sequence), set(teacher.pair.student_stops.tolist())
    for unit in range(len(units.student_U)):
        own, theirs = (
            ids[of == unit].tolist()
            for ids, of in (
                (sequence.actions_A, units.unit_A),
                (units.sequence.actions_A, units.unit_B),
            )
        )
        places = table.positions(own, theirs)
        read += sum(
            token in stops or (place is not None and not table.is_whitespace(token))
            for token, place in zip(own, places, strict=True)
        )
    return read


def _written(prepared: Prepared, text: str) -> Rollout:
    ids = [*retokenize(prepared.student.tokenizer, text).ids, prepared.student.stops.primary]
    return Rollout(prepared.source.prompts[0], TokenSequence.of([0]).then(ids, decided=True), text=text)


def test_a_record_holds_the_units_and_the_teachers_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    """The metrics by kind of unit are those of the record, which holds the whole batch here."""
    own = changed(settings, method={"name": "simct"}, steps=2, record={"rollouts": 4})
    go(own, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    student = AutoTokenizer.from_pretrained(settings["student"])
    for step, metrics in enumerate(lines(tmp_path / "run"), 1):
        losses: dict[str, list[float]] = {"one_to_one": [], "spans": []}
        stops: list[tuple[float, float]] = []
        for row in (row for row in rows if row["step"] == step):
            units, columns = row["units"]["teacher"], row["columns"]
            assert "teacher_units" not in columns
            assert len(units["sizes"]) == len(row["ids"])
            inside = [token for token, size in zip(row["ids"], units["sizes"], strict=True) if size is not None]
            read, spelt = ("".join(texts) for texts in (units["tokens"], shown_pieces(student, inside)))
            assert (
                read == spelt or "\\x" in read + spelt
            )  # a character may be whole on one side, and in parts on the other
            assert sum(size or 0 for size in units["sizes"]) == len(units["tokens"])
            for place, value in enumerate(columns["divergence.value"]):
                size, here = units["sizes"][place], place
                while units["sizes"][here] == 0:
                    here -= 1
                alone = units["sizes"][here] == 1 and units["sizes"][here + 1 : here + 2] != [0]
                if size is not None:
                    losses["one_to_one" if alone else "spans"].append(value)
            if row["status"] == "completed":
                stops.append((columns["student_logp"][-1], columns["teacher_logp"][-1]))
        for kind, values in losses.items():
            assert metrics[f"unit_loss/divergence/{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        every = losses["one_to_one"] + losses["spans"]
        assert metrics["loss/divergence"] == pytest.approx(sum(every) / len(every), abs=1e-4)
        for side, found in zip(("student", "teacher"), zip(*stops, strict=True), strict=False):
            mean = sum(math.exp(logp) for logp in found) / len(found)
            assert metrics[f"stop_probability/{side}"] == pytest.approx(mean, abs=1e-4)
        assert ("stop_probability/student" in metrics) == bool(stops)
