"""A run whose student learns by a LoRA adapter: it survives, saves only that, and ends in folders that others open."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort import api
from retort import config as configuration
from retort.core.rollouts import Message, Prompt
from retort.divergences import forward_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan
from retort.teachers.moving import ema, frozen
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.train import runner
from retort.train.output.summary import summary
from retort.train.setup.memory import forecast


@pytest.fixture
def lora_run(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> dict[str, Any]:
    """The tiny run with an adapter, on the head too."""
    student = model_folder(seed=1, tie_word_embeddings=False)
    sections = {"student": str(student), "lora": {"rank": 2, "targets": ["all-linear", "lm_head"]}}
    return configuration.merge(tiny_run, sections)


def go(settings: dict[str, Any], folder: Path, **sections: Any) -> runner.Run:
    return runner.start(configuration.resolve(configuration.merge(settings, sections)), folder).go()


def test_only_the_adapter_learns_and_is_saved(lora_run: dict[str, Any], tmp_path: Path) -> None:
    before = load_file(Path(lora_run["student"]) / "model.safetensors")
    run = go(lora_run, tmp_path / "run", optimizer={"weight_decay": 0.5})
    student = run.student
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.weights().items())
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "weights.safetensors")
    assert saved.keys() == student.trainable().keys()
    assert all("lora_" in name for name in saved)
    for name, tensor in saved.items():
        assert torch.equal(tensor, student.trainable()[name])
        assert "lora_A" in name or bool((tensor != 0).any()), f"{name} did not learn"
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "optimizer.safetensors")
    assert len({name.partition(".")[0] for name in moments}) == len(saved)
    said = summary(run.prepared)["student"]
    assert said.endswith(" learn, with a LoRA adapter of rank 2, alpha 4, on all-linear, lm_head")
    assert forecast(run.prepared).training == 12 * student.trainable_parameters
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    floors = [row["noise_floor"] for row in metrics if "noise_floor" in row]
    assert len(floors) == len(metrics)
    assert max(floors) < 1e-5, "engine and trainer compute with the same, unmerged adapter"


def test_kill_9_and_resume_is_bit_identical(lora_run: dict[str, Any], tmp_path: Path) -> None:
    go(lora_run, tmp_path / "whole")
    assert killed(lora_run, tmp_path / "killed", 3) == -signal.SIGKILL
    runner.resume(tmp_path / "killed").go()
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_settings_or_another_student_are_refused(
    lora_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    go(lora_run, tmp_path / "run", steps=2)
    go(lora_run, tmp_path / "full", steps=2, lora={"rank": 0, "targets": ["all-linear"]})

    def resumed(folder: str, **changes: Any) -> None:
        path = tmp_path / folder / "config.json"
        written = path.read_text()
        path.write_text(json.dumps(configuration.merge(json.loads(written), changes)))
        try:
            runner.resume(tmp_path / folder, steps=3)
        finally:
            path.write_text(written)

    was = "the student learnt with a LoRA adapter of rank 2, alpha 4, on all-linear, lm_head, and would go on "
    with pytest.raises(UserError, match=was + "with a LoRA adapter of rank 2, alpha 8, on all-linear, lm_head; put"):
        resumed("run", lora={"alpha": 8})
    with pytest.raises(UserError, match=was + "without an adapter; put lora back"):
        resumed("run", lora={"rank": 0, "targets": ["all-linear"]})
    with pytest.raises(UserError, match="learnt without an adapter, and would go on with a LoRA adapter of rank 2"):
        resumed("full", lora={"rank": 2})
    other = str(model_folder(seed=9, tie_word_embeddings=False))
    with pytest.raises(UserError, match="on which the adapter learns, changed since this checkpoint"):
        resumed("run", student=other)
    assert runner.resume(tmp_path / "run", steps=3).go().step == 3


# What peft asks of transformers in its own loading.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_others_open_what_is_written(
    lora_run: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    from peft import PeftModel

    targets = ["all-linear"] if tied else ["all-linear", "lm_head"]
    student = str(model_folder(seed=1, tie_word_embeddings=tied))
    run = go(lora_run, tmp_path / "run", student=student, lora={"targets": targets}, optimizer={"learning_rate": 0.05})
    folder, ids_RL = tmp_path / "run", torch.arange(1, 12)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        own, before = run.student.model(input_ids=ids_RL).logits, base(input_ids=ids_RL).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        assert torch.equal(adapted(input_ids=ids_RL).logits, own)
        assert not torch.allclose(before, own, atol=0.05)
        torch.testing.assert_close(merged(input_ids=ids_RL).logits, own, rtol=1e-4, atol=1e-4)
    plain = load_file(Path(student) / "model.safetensors")
    written = load_file(folder / "model" / "model.safetensors")
    assert written.keys() == plain.keys(), "an ordinary model folder"
    assert torch.equal(written["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert len(AutoTokenizer.from_pretrained(folder / "model")) == len(run.student.tokenizer)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 4, student)
    assert all("lora_" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert "with a LoRA adapter of rank 2, alpha 4, on all-linear" in (folder / "model" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in (folder / "adapter" / "README.md").read_text()


def test_the_student_as_it_was_needs_no_second_copy(lora_run: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "gopd", "reward_weight": 1.5}
    once = {"optimizer": {"updates": 1}}
    run = go(lora_run, tmp_path / "adapted", method=method, steps=2, **once)
    base = run.prepared.teachers.lms.get("base")
    assert base is not None
    assert base.model is run.student.model
    # A run with a copy of the student as its base, by another name, is the same run.
    copy = tmp_path / "copy"
    copy.symlink_to(lora_run["student"], target_is_directory=True)
    other = go(lora_run, tmp_path / "copied", method=method, steps=2, base=str(copy), **once)
    assert other.teachers.lms["base"] is not None
    assert other.teachers.lms["base"].model is not other.student.model
    for name, parameter in run.student.trainable().items():
        assert torch.equal(parameter, other.student.trainable()[name]), name


def test_self_teachers_keep_no_more_than_the_adapter(lora_run: dict[str, Any], tmp_path: Path) -> None:
    def hinted(scene: ViewInput) -> Prompt:
        prompt = scene.prompt
        return replace(prompt, messages=(Message("user", f"so {prompt.answer} {prompt.messages[-1].content}"),))

    views = {
        each.kind: View(model="student", weights=each, render=hinted) for each in (frozen(), ema(update_rate=0.25))
    }
    terms = tuple(Term(name, pathwise(forward_kl()), against=name) for name in views)
    method = Method(rollout=RolloutPlan(samples=2), terms=terms, views=views, name="self_taught")
    alone = {name: value for name, value in lora_run.items() if name != "teacher"}
    settings = api.assemble(alone, {"steps": 4, "checkpoint": {"every": 2}}, own=method)
    before = load_file(Path(lora_run["student"]) / "model.safetensors")
    run = runner.start(settings, tmp_path / "run", method=method)
    student, own = run.student, run.prepared.teachers.own
    assert own is not None
    assert own.bytes == 4 * student.trainable_parameters, "one copy of the adapter that follows; frozen needs none"
    run.go()
    ids_RL = torch.arange(1, 9)[None]
    with torch.no_grad():
        now = student.model(input_ids=ids_RL).logits
        with own.in_place(ema(update_rate=0.25)):
            behind = student.model(input_ids=ids_RL).logits
        with own.in_place(frozen()):
            start = student.model(input_ids=ids_RL).logits
        plain = AutoModelForCausalLM.from_pretrained(lora_run["student"], dtype=torch.float32)
        torch.testing.assert_close(start, plain(input_ids=ids_RL).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(now, behind)
    assert not torch.equal(behind, start)
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.weights().items())
    end = {name: parameter.detach().clone() for name, parameter in student.trainable().items()}
    again = runner.resume(tmp_path / "run" / "checkpoints" / "step-2", method=method).go()
    assert all(torch.equal(parameter, end[name]) for name, parameter in again.student.trainable().items())
    assert again.teachers.own is not None
    moved, kept = again.teachers.own.tensors(), own.tensors()
    assert moved.keys() == kept.keys() != set()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in moved.items())


def test_layers_computed_again_change_nothing(lora_run: dict[str, Any], tmp_path: Path) -> None:
    runs = [go(lora_run, tmp_path / str(on), steps=2, optimizer={"gradient_checkpointing": on}) for on in (False, True)]
    kept, again = (run.student.trainable() for run in runs)
    for name, parameter in kept.items():
        torch.testing.assert_close(again[name], parameter)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 2, "dropout": 0.1}, "lora.dropout: Retort has no dropout, under which .* leave it at 0"),
        ({"alpha": 16}, "lora: its settings do nothing without a rank"),
        ({"rank": 2, "targets": []}, "lora.targets: "),
        ({"rnk": 2}, "unknown key 'lora.rnk'; did you mean 'rank'"),
    ],
)
def test_settings_that_cannot_be(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        configuration.resolve({"lora": section})
