"""Runs whose student decides denoising steps: they learn, survive, and refuse what they cannot do, in one line."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from flowing import EXPERTS, ROWS, flow, planes, settings
from forked import killed
from safetensors.torch import load_file

import retort
from retort import config as configuration
from retort.errors import UserError
from retort.flows.model import FlowModel
from retort.flows.small import SmallFlow
from retort.train import runner
from retort.train.flows.prepare import decides_latents
from retort.train.given.given import CallerObjects
from retort.train.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("flows")
    planes(found)
    return found


def started(given: dict[str, Any], out: Path) -> Run:
    return runner.start(configuration.resolve(given), out)


def test_the_kl_falls_and_the_folder_opens_again(folder: Path, tmp_path: Path) -> None:
    run = started(settings(folder, steps=25, rollout={"prompts": 4}), tmp_path / "run").go()
    kl = [row["reverse_kl"] for row in run.metrics]
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5])
    assert {row["teacher_share/moons"] for row in run.metrics} == {0.5}
    assert run.metrics[0]["denoising_steps"] == 4 * 3 * 4
    by_step = [run.metrics[0][f"reverse_kl/step-{place}"] for place in range(1, 5)]
    assert sum(by_step) / 4 == pytest.approx(kl[0], rel=1e-5)
    trained = SmallFlow.open(tmp_path / "run" / "model")
    assert FlowModel(trained, "trained").digest() == run.student.digest()
    assert FlowModel(SmallFlow.open(folder / "student"), "before").digest() != run.student.digest()


def test_kill_9_and_resume_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    given = settings(folder, flow={"window": 2}, optimizer={"updates": 2, "learning_rate": 1e-2})
    started(given, tmp_path / "whole").go()
    assert killed(given, tmp_path / "killed", 3) == -signal.SIGKILL
    runner.resume(tmp_path / "killed").go()
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    # What was decided, too: log-densities of the latents are in the record.
    assert (tmp_path / "whole" / "rollouts.jsonl").read_text() == (tmp_path / "killed" / "rollouts.jsonl").read_text()


def test_an_expert_that_no_prompt_names_is_not_asked(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "moons.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS if row["domain"] == "moons"))
    run = started(settings(folder, data=str(tmp_path / "moons.jsonl"), steps=2), tmp_path / "run")
    asked: list[str] = []
    usual = FlowModel.velocity
    monkeypatch.setattr(FlowModel, "velocity", lambda own, *given: asked.append(own.name) or usual(own, *given))
    run.go()
    assert str(folder / "moons") in asked
    assert str(folder / "gaussians") not in asked


def test_models_and_rows_as_objects(folder: Path, tmp_path: Path) -> None:
    student = flow(0)
    before = FlowModel(student, "before").digest()
    kept = settings(folder)
    run = retort.distill(
        student=student,
        teacher=flow(1),
        data=ROWS,
        method="diffusion_opd",
        out=tmp_path / "run",
        steps=2,
        settings={"flow": kept["flow"], "eval": kept["eval"], "rollout": kept["rollout"], "device": "cpu"},
        quiet=True,
    )
    assert FlowModel(student, "after").digest() == before, "a copy of it learns"
    assert run.student.digest() != before
    with pytest.raises(UserError, match="was given as an object"):
        runner.resume(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_merged_start(folder: Path, tmp_path: Path, rank: int) -> None:
    run = started(
        settings(folder, flow={"start": "merge"}, lora={"rank": rank, "targets": ["all-linear"]} if rank else {}),
        tmp_path / "run",
    )
    weights = [load_file(folder / name / "model.safetensors") for name in EXPERTS]
    own = {name.replace(".base_layer", ""): x for name, x in run.student.of.module.state_dict().items()}  # type: ignore
    for name, first in weights[0].items():
        torch.testing.assert_close(own[name], (first + weights[1][name]) / 2)
    learning = run.student.trainable()
    assert all("lora" in name for name in learning) == bool(rank)
    run.go()
    assert (tmp_path / "run" / "adapter").is_dir() == bool(rank)


def _other(folder: Path, name: str, **config: Any) -> str:
    if not (folder / name).exists():
        flow(9, **config).save(folder / name)
    return str(folder / name)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "schedule": ({"models": {"moons": {"path": "@shifted"}}}, "its schedule is linear, shift 3, the student's is"),
    "architecture": ({"models": {"moons": {"path": "@three"}}}, "its architecture is small flow, latents 3"),
    "same weights": ({"models": {"moons": {"path": "@student"}}}, "moons .* holds the same weights as the student"),
    "no expert": ({"data": "@no-domain.jsonl"}, "row '1' has no `domain`"),
    "another expert": ({"data": "@other-domain.jsonl"}, "'hands', which is none of teachers.models"),
    "word": ({"data": "@word.jsonl"}, "does not know the word 'moo'; did you mean 'moon'"),
    "text setting": ({"rollout": {"max_new_tokens": 5}}, "rollout.max_new_tokens is for students of text"),
    "method": ({"method": {"name": "eopd", "samples": 2}}, "cannot teach denoising steps"),
    "window": ({"flow": {"window": 5}}, "flow.window = 5 does not fit into the first 4"),
    "noise": ({"flow": {"sampler": "cps", "noise_level": 2}}, "must be at most 1"),
    "reward": ({"flow": {"rewards": ["beauty"]}}, "beauty"),
    "combine": ({"teachers": {"combine": "mixture"}}, "use combine = route"),
    "peft target": ({"lora": {"rank": 2, "targets": ["nothing"]}}, "no linear layer 'nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, case: str) -> None:
    changed, line = BAD[case]
    _other(folder, "shifted", shift=3.0)
    _other(folder, "three", latent_shape=(3,))
    for name, own in (("no-domain", {}), ("other-domain", {"domain": "hands"})):
        rows = [{"id": row["id"], "prompt": row["prompt"], **own} for row in ROWS]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "word.jsonl").write_text(json.dumps({"prompt": "upper moo", "domain": "moons"}) + "\n")
    given = json.loads(json.dumps(settings(folder, **changed)).replace('"@', f'"{folder}/'))
    if "models" in changed:
        given["models"]["gaussians"] = {"path": str(folder / "gaussians")}
    with pytest.raises(UserError, match=line) as raised:
        started(given, tmp_path / "run").go()
    assert "\n" not in str(raised.value)


def test_a_run_on_other_weights_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "models")
    run = started(settings(tmp_path / "models", steps=2), tmp_path / "run").go()
    shutil.rmtree(tmp_path / "models" / "moons")
    flow(77).save(tmp_path / "models" / "moons")
    with pytest.raises(UserError, match="the moons's weights changed since this checkpoint"):
        runner.resume(run.folder, steps=3)


def test_a_method_of_denoising_steps_needs_a_student_that_denoises(tmp_path: Path) -> None:
    given = {"student": "countdown:student", "teacher": "countdown:teacher", "data": "countdown", "limit": 4}
    given |= {"method": {"name": "flow_opd"}, "eval": {"problems": 0}}
    with pytest.raises(UserError, match="the student, too, must be a flow model"):
        started(given, tmp_path / "run").go()


def test_a_text_run_by_hub_names_stays_one_when_its_settings_are_read_again(tmp_path: Path) -> None:
    given = configuration.resolve({"student": "Qwen/Qwen3-0.6B", "teacher": "Qwen/Qwen3-4B", "data": "math.jsonl"})
    configuration.save(given, tmp_path / "config.json")  # every setting is in it, those of flows too
    again = configuration.read_json(tmp_path / "config.json")
    assert not decides_latents(again, None, CallerObjects())
    asked = configuration.resolve({"student": "some/flow", "flow": {"guidance": 4.5}})
    assert decides_latents(asked, None, CallerObjects()), "a hub name says nothing, and a setting of flows does"
