"""`retort doctor`: the built-in pair passes, and for each failure a pair that must be caught."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from support import make_model, make_tokenizer
from torch import Tensor

import retort
from retort import api, registry
from retort.align.stops import StopTokens
from retort.cli import main
from retort.errors import UserError
from retort.models.sharding import layers_of
from retort.preflight import checks, trial
from retort.preflight.doctor import examine, examine_setup, refuse
from retort.preflight.findings import Check, Examination
from retort.ranks import World
from retort.train.setup import memory
from retort.train.setup.prepare import Prepared, prepare
from retort.train.source.source import Source

QUICK = [
    "tokenizer",
    "special tokens",
    "stop token",
    "chat template",
    "prompt's end",
    "prompts",
    "vocabulary",
    "lengths",
    "teacher is loaded",
    "teacher repeats",
    "memory",
]


@pytest.fixture(scope="module")
def builtin() -> Prepared:
    return prepare(api.assemble({"method": {"name": "opd"}}))


def tiny(settings: dict[str, Any], **more: Any) -> Prepared:
    return prepare(api.assemble(settings, more))


def test_the_built_in_pair_is_fine() -> None:
    found = retort.doctor()
    assert [(check.name, check.verdict) for check in found.checks] == [
        (name, "ok") for name in [*QUICK, "noise floor", "stopping", "teachability"]
    ]
    assert found.verdict == "ok"
    assert all(check.saw and check.why for check in found.checks)
    values = dict(found["teachability"].values)
    assert 0.4 < values["overlap_ratio"] < 0.9
    assert 0.9 < values["overlap_mass"] <= 1.0
    assert values["trajectory_auroc"] > 0.7, "this teacher knows what is right"
    assert dict(found["noise floor"].values)["noise_floor"] < 1e-5


def test_the_command(capsys: pytest.CaptureFixture[str], model_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "ok"
    assert [check["name"] for check in found["checks"]] == QUICK
    pair = ["--student", str(model_folder(seed=1)), "--teacher", str(model_folder(seed=2))]
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 2 =", "response": "so the answer is 3", "answer": "3"}\n' * 8)
    small = ["rollout.max_new_tokens=6", "task=exact", "eval.problems=0"]
    assert main(["doctor", *pair, "--data", str(data), *small]) == 2
    shown = capsys.readouterr().out
    assert "teacher is loaded" in shown
    assert "what to do" in shown
    assert main(["doctor", "--stundent", "x"]) == 2


def test_a_tokenizer_that_cannot_be_read_is_not_ok(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("GGUF")
    for who in ("student", "teacher"):
        found = examine(api.assemble({**tiny_run, who: str(tmp_path)}))
        assert [(check.name, check.verdict) for check in found.checks] == [("setup", "fatal")]
        assert "GGUF" in found["setup"].saw and "docs/gguf.md" in found["setup"].line


def test_other_tokenizer(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    other = model_folder(seed=2, words=[*"abcdefgh", "from", "so"])
    nothing = examine(api.assemble({**tiny_run, "teacher": str(other)}), quick=True)["units"]
    assert dict(nothing.values)["one_to_one"] == dict(nothing.values)["spans"] == 0, "and no shapes to show"
    assert nothing.verdict == "fatal", "there is nothing to learn from"
    found = examine(api.assemble({**tiny_run, "teacher": str(other), "method": {"name": "eopd"}}))
    assert found["tokenizer"].verdict == "fatal"
    assert "different tokenizers" in found["tokenizer"].saw
    assert "teacher of the student's family" in found["tokenizer"].remedy
    assert len(found.checks) == 1, "what follows would be meaningless"


def test_special_to_one_side_only(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "teacher", seed=2)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["answer"]})
    tokenizer.save_pretrained(folder)
    check = checks.check_special_tokens(tiny({**tiny_run, "teacher": str(folder)}))
    assert check.verdict == "warn"
    assert "answer" in check.saw
    assert "teacher" in check.saw
    assert checks.check_special_tokens(tiny(tiny_run)).verdict == "ok"


def test_a_stop_that_only_one_side_has(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The teacher has rows up to the student's stop only."""
    words = ["so", "the"]
    student = make_model(tmp_path / "student", seed=1, words=words)
    tokenizer = make_tokenizer(words=words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(student)
    config = json.loads((student / "config.json").read_text())
    config["eos_token_id"] = tokenizer.eos_token_id
    (student / "config.json").write_text(json.dumps(config))
    generation = json.loads((student / "generation_config.json").read_text())
    generation["eos_token_id"] = tokenizer.eos_token_id
    (student / "generation_config.json").write_text(json.dumps(generation))
    teacher = make_model(tmp_path / "teacher", seed=2, words=words)
    found = examine(api.assemble({**tiny_run, "student": str(student), "teacher": str(teacher)}))
    assert found["stop token"].verdict == "fatal"
    assert "not among the" in found["stop token"].saw


def test_other_stop_is_mapped_and_said(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> None:
    check = checks.check_stops(tiny({**tiny_run, "teacher": str(model_folder(seed=2, eos="<|im_end|>"))}))
    assert check.verdict == "ok"
    assert "reads as its own stop" in check.saw


def test_other_sets_of_stops_are_found_at_equal_size(
    tiny_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "teacher", seed=2)
    setup = tiny({**tiny_run, "student": str(model_folder(seed=1)), "teacher": str(folder)})
    primary, student, teacher = setup.student.stops.primary, setup.student, setup.teachers.lms.get("teacher")
    assert teacher is not None
    for ours, theirs, verdict in (({3}, {4}, "warn"), ({3}, {3}, "ok"), ({3}, set[int](), "warn")):
        student.stops = StopTokens(frozenset({primary, *ours}), primary)
        teacher.stops = StopTokens(frozenset({primary, *theirs}), primary)
        check = checks.check_stops(setup)
        assert (check.verdict, "the two sets differ" in check.saw) == (verdict, verdict == "warn")


def test_chat_templates(tiny_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path) -> None:
    check = checks.check_chat_templates(tiny({**tiny_run, "teacher": str(model_folder(seed=2, chat=True))}))
    assert (check.verdict, "only the teacher has one" in check.saw) == ("warn", True)
    chatty = {**tiny_run, "student": str(model_folder(seed=1, chat=True))}
    same = {**chatty, "teacher": str(model_folder(seed=2, chat=True))}
    assert checks.check_chat_templates(tiny(same)).verdict == "ok"
    folder = make_model(tmp_path / "teacher", seed=2, chat=True)
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>so the {{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    check = checks.check_chat_templates(tiny({**chatty, "teacher": str(folder)}))
    assert check.verdict == "warn"
    assert "from 1 on" in check.saw


def test_ids_without_rows(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "teacher", seed=2)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra", "more"])
    tokenizer.save_pretrained(folder)
    check = checks.check_vocabulary(tiny({**tiny_run, "teacher": str(folder)}))
    assert check.verdict == "warn"
    assert "the teacher's model lacks rows for ids" in check.saw
    assert checks.check_vocabulary(tiny(tiny_run)).verdict == "ok", "padding is fine"


def test_random_weights(builtin: Prepared, tmp_path: Path) -> None:
    """The built-in teacher with its weights drawn anew: everything loads, and everything would run."""
    from transformers import AutoModelForCausalLM

    from retort.tasks import countdown

    good = AutoModelForCausalLM.from_pretrained(countdown.teacher_path())
    lost = AutoModelForCausalLM.from_config(good.config)
    lost.generation_config = good.generation_config
    lost.save_pretrained(tmp_path / "teacher")
    builtin.teachers.lms["teacher"].tokenizer.save_pretrained(tmp_path / "teacher")
    settings = {"student": "countdown:student", "teacher": str(tmp_path / "teacher"), "data": "countdown"}
    setup = prepare(api.assemble({**settings, "rollout": {"max_new_tokens": 14}, "method": {"name": "opd"}}))
    check = checks.check_teacher_loaded(setup)
    values = dict(check.values)
    assert check.verdict == "fatal"
    assert values["uniform_nats"] == pytest.approx(math.log(266))
    assert values["nats_per_token"] > 0.9 * values["uniform_nats"]
    good_values = dict(checks.check_teacher_loaded(builtin).values)
    assert good_values["nats_per_token"] < 0.1 * good_values["uniform_nats"]


def test_a_toy_that_never_learnt_its_prompts_is_not_called_random(builtin: Prepared) -> None:
    prompts = [replace(prompt, response=None) for prompt in builtin.source.prompts[:16]]
    bare = replace(builtin, source=replace(builtin.source, prompts=prompts))
    check = checks.check_teacher_loaded(bare)
    assert "prompts of the data" in check.saw
    assert check.verdict in ("ok", "warn")


@pytest.mark.parametrize(("noise", "verdict"), [(0.0, "ok"), (1e-3, "warn"), (1.0, "fatal")])
def test_a_teacher_that_answers_by_chance(noise: float, verdict: str) -> None:
    setup = prepare(api.assemble({"method": {"name": "opd"}}))
    draw = torch.Generator().manual_seed(0)

    def disturb(module: object, given: object, out: Tensor) -> Tensor:
        return out + noise * torch.randn(out.shape, generator=draw)

    setup.teachers.lms["teacher"].model.base_model.norm.register_forward_hook(disturb)  # type: ignore[union-attr, operator]
    assert checks.check_teacher_repeats(setup).verdict == verdict


def test_too_little_memory(builtin: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = memory.forecast(builtin).peak
    loaded = memory.forecast(builtin).models
    for there, verdict in ((2 * peak, "ok"), (1.05 * peak, "warn"), (0.5 * peak, "fatal")):
        monkeypatch.setattr(checks, "available", lambda device, there=there: int(there) - loaded)
        check = checks.check_memory(builtin)
        assert check.verdict == verdict
        assert (check.remedy == "") == (verdict == "ok")
    monkeypatch.setattr(checks, "available", lambda device: None)
    assert checks.check_memory(builtin).verdict == "ok"


def test_the_forecast_knows_what_it_is_about(tiny_run: dict[str, Any]) -> None:
    setup = tiny(tiny_run)
    found = memory.forecast(setup)
    student, teacher = setup.student.parameters, setup.teachers.lms["teacher"].parameters
    assert found.models == 4 * (student + teacher)
    assert found.training == 12 * student
    with_base = tiny(tiny_run, method={"name": "gopd"})
    assert memory.forecast(with_base).models == found.models + 4 * student
    longer = tiny(tiny_run, optimizer={"batch_tokens": 16})
    assert memory.forecast(longer).activations < found.activations
    assert memory.available(torch.device("cpu")) is None or memory.available(torch.device("cpu")) > 2**20  # type: ignore[operator]


class Four(World):
    size = 4


def test_the_forecast_of_several_ranks_is_that_of_one_of_them(tiny_run: dict[str, Any]) -> None:
    """Slices of the student, its gradients and moments; the teacher whole, or slices of its layers."""
    setup = tiny(tiny_run)
    alone, teacher = memory.forecast(setup), setup.teachers.lms["teacher"]
    setup.learner.passes = replace(setup.learner.passes, world=Four())
    found = memory.forecast(setup)
    student = 4 * setup.student.parameters
    assert found.models == student // 4 + 4 * teacher.parameters
    assert found.training == 3 * student // 4
    assert found.loaded == alone.models and found.whole == student and found.gathered > 0
    assert found.cache < alone.cache and found.signals < alone.signals
    assert "at peak on each of 4 ranks" in str(found) and "ranks" not in str(alone)
    sharded = memory.forecast(replace(setup, config=setup.config.changed("ranks.teacher", "sharded")))
    layers = 4 * sum(p.numel() for layer in layers_of(teacher.model) for p in layer.parameters())
    assert sharded.models == found.models - layers * 3 // 4


def test_an_engine_that_is_not_the_trainer(builtin: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Source.rollouts

    def off_by(nats: float) -> None:
        def write(*arguments: Any) -> list[Any]:
            return [
                tuple(replace(r, engine_logp_A=r.engine_logp_A + nats) for r in group)  # type: ignore[operator]
                for group in written(*arguments)
            ]

        monkeypatch.setattr(Source, "rollouts", write)

    for nats, verdict in ((0.0, "ok"), (0.1, "warn"), (1.0, "fatal")):
        off_by(nats)
        check = trial.check_noise_floor(trial.run_trial(builtin))
        assert check.verdict == verdict
        assert dict(check.values)["noise_floor"] == pytest.approx(nats, abs=1e-4)


def test_a_student_that_never_ends(builtin: Prepared) -> None:
    short = replace(builtin, source=replace(builtin.source, limit=3))
    check = trial.check_stopping(trial.run_trial(short))
    assert check.verdict == "warn"
    assert "0 of 16" in check.saw


def test_a_teacher_that_considers_nothing_the_student_writes(builtin: Prepared) -> None:
    """The very teacher, with every id read as another one."""
    setup = prepare(api.assemble({"method": {"name": "opd"}}))
    head = setup.teachers.lms["teacher"].model.get_output_embeddings()
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight.roll(97, 0), requires_grad=False)  # type: ignore[union-attr, operator]
    check = trial.check_teachability(setup, trial.run_trial(setup))
    assert check.verdict == "fatal"
    assert "nothing that the teacher would consider" in check.saw
    assert "cold start" in check.remedy


def test_a_teacher_with_nothing_to_add(tmp_path: Path) -> None:
    """The student as its own teacher, but for a rounding."""
    settings = {"student": "countdown:student", "teacher": "countdown:teacher", "data": "countdown"}
    setup = prepare(api.assemble({**settings, "method": {"name": "opd"}, "rollout": {"max_new_tokens": 14}}))
    for teacher in setup.teachers.models.values():
        teacher.lm = setup.student  # type: ignore[attr-defined]
    check = trial.check_teachability(setup, trial.run_trial(setup))
    assert check.verdict == "warn"
    assert "times the noise floor" in check.saw
    assert "teacher that differs" in check.remedy


def test_a_teacher_far_surer_than_the_student(builtin: Prepared) -> None:
    setup = prepare(api.assemble({"method": {"name": "opd"}}))
    with torch.no_grad():
        setup.student.model.get_output_embeddings().weight.mul_(0.3)  # type: ignore[union-attr, operator]
    check = trial.check_teachability(setup, trial.run_trial(setup))
    assert check.verdict in ("warn", "fatal")
    assert "far surer" in check.saw


def test_training_refuses_what_is_fatal(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in tiny_run.items() if key not in ("student", "teacher", "data", "checks")}
    named = {key: tiny_run[key] for key in ("student", "teacher", "data")}
    with pytest.raises(UserError, match="teacher is loaded: .* checks=warn") as caught:
        retort.distill(**named, settings=settings, method="opd", out=str(tmp_path / "refused"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
    for how in ("warn", "skip"):
        run = retort.distill(
            **named, settings={**settings, "checks": how, "steps": 1}, method="opd", out=str(tmp_path / how)
        )
        assert any("teacher is loaded" in note for note in run.prepared.notes) == (how == "warn")


def test_nothing_fatal_nothing_refused() -> None:
    refuse(Examination((Check("a", "ok", "x", "y"), Check("b", "warn", "x", "y", "z"))))
    with pytest.raises(UserError, match=r"b: x; z \(and 1 more"):
        refuse(Examination((Check("b", "fatal", "x", "y", "z"), Check("c", "fatal", "x", "y"))))


def test_it_changes_nothing(builtin: Prepared) -> None:
    before = builtin.student.digest(), list(builtin.notes), builtin.student.model.training
    examine_setup(builtin)
    assert (builtin.student.digest(), builtin.notes, builtin.student.model.training) == before


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in registry.for_tokens()), ("opct", {"discount": 0.9})]
)
@pytest.mark.usefixtures("images_as_text")
@pipeline.models_once()
def test_every_method_can_be_examined(name: str, more: dict[str, Any], tiny_run: dict[str, Any]) -> None:
    """Also those whose terms read statistics of a whole batch, which a trial does not take."""
    bare = pipeline.for_method(tiny_run, registry.load(name, **more))
    setup = prepare(api.assemble({**bare, "method": {"name": name, **more}}))
    found = {check.name: check for check in trial.trial_checks(setup)}
    assert found["noise floor"].verdict == "ok"
    assert found["stopping"].saw
    assert ("teachability" in found) == any(view.model == "teacher" for view in setup.method.views.values())


def test_tasks_of_an_environment_do_not_tell_whether_a_teacher_is_loaded() -> None:
    found = examine(api.assemble({"data": "rooms"}), quick=True)["teacher is loaded"]
    assert found.verdict == "ok"
    assert "tasks of an environment" in found.saw
    assert dict(found.values)["nats_per_token"] > dict(found.values)["uniform_nats"]
