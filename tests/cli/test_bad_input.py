"""Bad input: one clear line on stderr, exit code 2, and nothing begun."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_model
from transformers import AutoModelForCausalLM

from retort import config as configuration
from retort.cli import main
from retort.core.needs import Need, NeedKind
from retort.core.rollouts import Group, Pack
from retort.core.signals import Dense, Sampled, TeacherSignal
from retort.errors import RunError, UserError
from retort.teachers.base import ScoreRequest
from retort.train import runner

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `retort train` with the tiny run's settings, changed; returns exit code and what it said on stderr."""

    def run(*words: str, **changes: str | None) -> tuple[int, str]:
        flags = {name: tiny_run[name] for name in ("student", "teacher", "data")} | {"out": str(tmp_path / "run")}
        given = {name: value for name, value in {**flags, **changes}.items() if value is not None}
        arguments = [word for name, value in given.items() for word in (f"--{name}", value)]
        settings = [
            "task=exact",
            "checks=warn",
            "precision=fp32",
            "steps=2",
            "rollout.prompts=4",
            "rollout.max_new_tokens=6",
        ]
        small = ["eval.problems=2", "eval.samples=2", "eval.max_new_tokens=6", "rollout.max_prompt_tokens=32"]
        code = main(["train", *arguments, *settings, *small, *words])
        return code, capsys.readouterr().err.strip()

    return run


def said(result: tuple[int, str], *parts: str, code: int = 2) -> None:
    assert result[0] == code, result
    assert "\n" not in result[1], f"more than one line: {result[1]}"
    assert result[1].startswith("retort: ")
    for part in parts:
        assert part in result[1], result[1]


def test_the_tiny_run_itself_is_fine(command: Command) -> None:
    assert command()[0] == 0


@pytest.mark.parametrize("method", ["opd", "gkd", "eopd", "vopd"])
def test_two_steps_of_every_method(command: Command, method: str, tmp_path: Path) -> None:
    code, error = command("--method", method)
    assert (code, error) == (0, "")
    assert (tmp_path / "run" / "report.html").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert method in card
    assert "avg@2" in card


def test_unknown_names_come_with_the_nearest(command: Command) -> None:
    said(command("--method", "eodp"), "unknown method 'eodp'", "did you mean 'eopd'")
    said(command("rollout.smaples=3"), "unknown key 'rollout.smaples'", "known:")
    said(command("optimizer.learning_rte=1"), "unknown key 'optimizer.learning_rte'", "did you mean 'learning_rate'")
    said(command("method.entropy_treshold=1"), "no setting 'entropy_treshold'", "did you mean 'entropy_threshold'")
    said(command("stepz=3"), "unknown key 'stepz'", "did you mean 'steps'")
    said(command("--learning-rate", "3"), "unknown option --learning-rate")
    said(command("steps"), "neither a .toml file nor key=value (such as method.entropy_threshold=0.6)")
    said(command("eopd"), "neither a .toml file nor key=value (a method is chosen by --method eopd)")
    said(command("optimizer.learning_rate=fast"), "optimizer.learning_rate", "'fast'")


def test_missing_or_wrong_models_and_data(command: Command, tmp_path: Path) -> None:
    said(command(teacher=None), "teacher is missing")
    said(command(data=None), "data is missing")
    said(command(student=str(tmp_path / "nowhere")), "no such folder")
    (tmp_path / "empty").mkdir()
    said(command(teacher=str(tmp_path / "empty")), "no config.json")
    said(command(data=str(tmp_path / "nowhere.jsonl")), "nowhere.jsonl", "no such file")


def test_data_files(command: Command, tmp_path: Path) -> None:
    def data(text: str) -> str:
        path = tmp_path / "bad.jsonl"
        path.write_text(text)
        return str(path)

    said(command(data=data("")), "bad.jsonl", "no rows")
    said(command(data=data('{"prompt": "1 + 1 ="}\n{"prompt": "1 +')), "bad.jsonl", "2")
    said(command(data=data('{"promt": "1 + 1 ="}\n')), "promt", "did you mean")
    said(command("columns.prompt=question", data=data('{"problem": "1"}\n')), "question")
    rows = '{"prompt": "1 + 1 ="}\n' * 8
    said(command("--method", "gkd", data=data(rows)), "response", "method.on_policy_fraction=1")


def test_prompts_that_do_not_fit(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"id": f"row-{n}", "prompt": "1 + " * n}) + "\n" for n in (1, 2, 3, 4, 70)))
    said(command("eval.problems=0", "task=none", data=str(path)), "row 'row-70'", "rollout.max_prompt_tokens")
    said(
        command("eval.problems=0", "task=none", "rollout.max_prompt_tokens=200", data=str(path)),
        "row 'row-70'",
        "context of 128",
    )


def test_fewer_prompts_than_a_batch_are_trained_on_and_said(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "answer": str(n + 1)}) + "\n" for n in range(3)))
    code = main(
        ["train", *_tiny_words(command, tmp_path), "--data", str(path), "rollout.prompts=32", "eval.problems=0"]
    )
    assert code == 0
    assert "3 prompts are fewer than the 32 of a batch" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "few" / "metrics.jsonl").read_text().splitlines()) == 2


def _tiny_words(command: Command, tmp_path: Path) -> list[str]:
    models = [make_model(tmp_path / name, seed=seed) for name, seed in (("s", 1), ("t", 2))]
    return [
        *("--student", str(models[0]), "--teacher", str(models[1]), "--out", str(tmp_path / "few")),
        *(
            "task=exact",
            "checks=warn",
            "precision=fp32",
            "steps=2",
            "rollout.max_new_tokens=6",
            "rollout.max_prompt_tokens=32",
        ),
    ]


def test_no_write_permission(command: Command, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    said(command(out=str(blocked / "run")), "out =", "--out")
    if os.geteuid() == 0:
        return  # root may write everywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    said(command(out=str(tmp_path / "locked" / "run")), "no permission")


def test_same_model_twice(command: Command, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    said(command(teacher=tiny_run["student"]), "are the same model", "nothing to learn")
    copy = make_model(tmp_path / "copy", seed=1)
    said(command(teacher=str(copy)), "hold the same weights")


def test_tokenizers_that_disagree(command: Command, tmp_path: Path) -> None:
    words = [*"zyxw", *(str(number) for number in range(40))]
    other = make_model(tmp_path / "other", seed=2, words=words)
    said(command("--method", "eopd", teacher=str(other)), "44 of 49 ids disagree", "tokenizers")


def test_a_stop_token_that_is_an_ordinary_word(command: Command, tmp_path: Path) -> None:
    odd = make_model(tmp_path / "odd", seed=1, eos_token_id=9)
    said(command(student=str(odd)), "stop", "9", "rollout.stop")


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "no run to resume" in capsys.readouterr().err


def test_resume_takes_no_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path), "optimizer.learning_rate=1"]) == 2
    assert "only --steps" in capsys.readouterr().err


class FakeTeacher:
    """A teacher whose answers are made up."""

    name = "fake"

    def __init__(self, capabilities: set[NeedKind], answer: Callable[[Pack], TeacherSignal]) -> None:
        self.capabilities = frozenset(capabilities)
        self._answer = answer
        self.asked: list[frozenset[Need]] = []

    def score(self, groups: Sequence[Group], ask: ScoreRequest) -> TeacherSignal:
        self.asked.append(ask.needs)
        return self._answer(Pack.of([rollout for group in groups for rollout in group]))


def run_with(teacher: FakeTeacher, settings: dict[str, Any], folder: Path, method: str) -> runner.Run:
    sections = {"method": {"name": method}, "steps": 1, "eval": {"problems": 0}}
    run = runner.start(configuration.resolve(configuration.merge(settings, sections)), folder)
    run.prepared.teachers.models["teacher"] = teacher
    return run


def test_a_teacher_of_sampled_log_probs_only(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    teacher = FakeTeacher({"sampled"}, lambda pack: Sampled(pack.steps.tokens_N, "fake", -2 * torch.ones(len(pack))))
    run_with(teacher, tiny_run, tmp_path / "opd", "opd").go()
    assert [sorted(need.kind for need in asked) for asked in teacher.asked] == [["sampled"]]
    for method in ("eopd", "gkd", "vopd"):
        with pytest.raises(UserError, match="gives only: sampled"):
            run_with(teacher, tiny_run, tmp_path / method, method).go()


def _logits(pack: Pack, at: int | None, value: float) -> TeacherSignal:
    logits = torch.zeros(len(pack), 61)
    if at is not None:
        logits[0, at] = value
    return Dense.of(logits, pack.steps.tokens_N, source="fake")


@pytest.mark.parametrize("method", ["opd", "gkd", "eopd", "vopd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_infinite_logit_stops_the_run_before_the_update(
    tiny_run: dict[str, Any], tmp_path: Path, method: str, value: float
) -> None:
    run = run_with(FakeTeacher({"dense"}, lambda pack: _logits(pack, 7, value)), tiny_run, tmp_path / "run", method)
    before = [parameter.detach().clone() for parameter in run.student.model.parameters()]
    with pytest.raises(RunError, match="fake: a logit"):
        run.go()
    for old, parameter in zip(before, run.student.model.parameters(), strict=True):
        assert torch.equal(old, parameter)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_banned_id_leaves_forward_kl_and_jsd_finite(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    for number, method in enumerate(({"name": "gkd"}, {"name": "gkd", "divergence": "forward_kl"})):
        sections = {"method": {**method, "on_policy_fraction": 1.0}, "steps": 1, "eval": {"problems": 0}}
        config = configuration.resolve(configuration.merge(tiny_run, sections))
        run = runner.start(config, tmp_path / str(number))
        run.prepared.teachers.models["teacher"] = FakeTeacher({"dense"}, lambda pack: _logits(pack, 7, float("-inf")))
        run.go()
        assert run.step == 1


def test_a_truly_infinite_divergence_stops_and_names_the_id(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "gkd", "divergence": "reverse_kl", "on_policy_fraction": 1.0}
    config = configuration.resolve(
        configuration.merge(tiny_run, {"method": method, "steps": 1, "eval": {"problems": 0}})
    )
    run = runner.start(config, tmp_path / "run")
    run.prepared.teachers.models["teacher"] = FakeTeacher({"dense"}, lambda pack: _logits(pack, 7, float("-inf")))
    with pytest.raises(RunError, match=r"term 'divergence' is infinite at token 0 .* probability 0 to id 7 \('2'\)"):
        run.go()


def test_a_banned_token_that_was_written_stops_sampled_methods(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    def ban_first(pack: Pack) -> TeacherSignal:
        return _logits(pack, int(pack.steps.tokens_N[0]), float("-inf"))

    for method in ("opd", "eopd"):
        with pytest.raises(RunError, match="term 'reverse' is infinite at token 0"):
            run_with(FakeTeacher({"dense"}, ban_first), tiny_run, tmp_path / method, method).go()


def test_a_misaligned_teacher_is_refused(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    def shifted(pack: Pack) -> TeacherSignal:
        return Sampled((pack.steps.tokens_N + 1) % 60, "fake", torch.full((len(pack),), -2.0))

    with pytest.raises(RunError, match="fake: misaligned at step 0"):
        run_with(FakeTeacher({"sampled"}, shifted), tiny_run, tmp_path / "run", "opd").go()

    def short(pack: Pack) -> TeacherSignal:
        return Sampled(pack.steps.tokens_N[1:], "fake", torch.full((len(pack) - 1,), -2.0))

    with pytest.raises(RunError, match="fake: scored"):
        run_with(FakeTeacher({"sampled"}, short), tiny_run, tmp_path / "short", "opd").go()


def test_odd_words(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(command("rollout=3", "rollout.prompts=4"), "rollout was given a value before")
    assert main(["--foo", "train"]) == 2
    assert "unknown option --foo" in capsys.readouterr().err
    assert command("method=opd")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"]["name"] == "opd"
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_unlabelled_training_prompts_and_a_labelled_evaluation_file(
    tiny_run: dict[str, Any], prompts_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.jsonl"
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    bare.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    sections = {"data": str(bare), "eval": {"data": str(prompts_file)}, "steps": 1}
    run = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "run")
    assert any("not every training prompt has an answer" in note for note in run.prepared.notes)
    run.go()
    assert "avg@2" in run.results["rows"][0]
    sections["eval"] = {"data": str(prompts_file), "problems": 0}  # type: ignore[assignment]
    none = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "none")
    assert none.prepared.held_out == []


def test_a_missing_tracker_package_is_said_before_anything_is_judged(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="'trackio' needs the package trackio: pip install"):
        runner.start(configuration.resolve({**tiny_run, "tracker": "trackio"}), tmp_path / "run")
    runner.start(configuration.resolve(tiny_run), tmp_path / "run")  # the folder is not taken by the attempt


@pytest.mark.parametrize(("data", "meant"), [("countdwon", "countdown"), ("rankin", "ranking"), ("coachd", "coached")])
@pytest.mark.parametrize("models", [[], ["--student", "x"]])
def test_a_misspelt_task_is_seen_first(
    capsys: pytest.CaptureFixture[str], data: str, meant: str, models: list[str]
) -> None:
    assert main(["train", "--data", data, *models]) == 2
    assert f"did you mean '{meant}'" in capsys.readouterr().err
