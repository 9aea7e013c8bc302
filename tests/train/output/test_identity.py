"""What a resumed run notices: settings, models, tokenizers, templates, prompts and versions that changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import make_model

import retort
from retort import config as configuration
from retort.cli import main
from retort.cli.trust import measure
from retort.errors import UserError
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.models import loading
from retort.train.storage import checkpoint


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with models, data and held-out data of its own."""
    tmp_path = tmp_path_factory.mktemp("original")
    for who, seed in (("student", 1), ("teacher", 2)):
        make_model(tmp_path / who, seed=seed, chat=True)
    for name, first in (("data", 0), ("held", 5)):
        rows = [{"prompt": f"add {a} {b}", "answer": str(a + b)} for a in range(first, first + 4) for b in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{who: str(tmp_path / who) for who in ("student", "teacher")},
        "data": str(tmp_path / "data.jsonl"),
        "task": "exact",
        "steps": 1,
        "precision": "fp32",
        "rollout": {"prompts": 4, "max_new_tokens": 4},
        "eval": {"data": str(tmp_path / "held.jsonl"), "problems": 4, "samples": 2, "max_new_tokens": 4},
    }
    runner.start(configuration.resolve(settings), tmp_path / "run").go()
    return tmp_path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of all that, whose settings name the copies."""
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    file = copy / "run" / "config.json"
    file.write_text(file.read_text().replace(str(original), str(copy)))
    return copy


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(configuration.merge(json.loads(file.read_text()), changes)))


def one_weight(folder: Path) -> None:
    """Changes a single weight, away from any sample of the first elements."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[tensors[name].numel() // 2 + 1] += 0.125
    save_file(tensors, file, metadata={"format": "pt"})


def refused(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        runner.resume(run / "run", steps=2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 3}, "seed = 3 (it was 0)"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate = 0.5"),
        ({"optimizer": {"schedule": "constant"}}, "optimizer.schedule"),
        ({"rollout": {"prompts": 2}}, "rollout.prompts = 2 (it was 4)"),
        ({"method": {"name": "opd", "temperature": 0.5}}, "method"),
        ({"precision": "bf16"}, "precision"),
        ({"eval": {"samples": 3}}, "eval.samples = 3 (it was 2)"),
        ({"rollout": {"stop": ["<|im_end|>"]}}, "rollout.stop"),
    ],
)
def test_settings_that_make_another_run_are_refused(run: Path, changes: dict[str, Any], name: str) -> None:
    edited(run / "run" / "config.json", **changes)
    message = refused(run)
    assert name in message
    assert "config.json" in message


def held_out(run: Path) -> None:
    file = run / "held.jsonl"
    file.write_text(file.read_text().replace("add 5 0", "add 6 7"))


def template(run: Path) -> None:
    file = run / "teacher" / "chat_template.jinja"
    file.write_text(file.read_text() + "{# other #}")


def tokenizer(run: Path) -> None:
    file = run / "student" / "tokenizer.json"
    written = json.loads(file.read_text())
    written["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": False}
    file.write_text(json.dumps(written))
    shutil.copy(file, run / "teacher" / "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda run: one_weight(run / "teacher"), "the teacher's weights"),
        (lambda run: one_weight(run / "student"), "the student's weights"),
        (lambda run: edited(run / "teacher" / "config.json", rms_norm_eps=0.01), "the teacher's configuration"),
        (held_out, "the held-out prompts"),
        (template, "the teacher's chat template"),
        (tokenizer, "the student's tokenizer"),
    ],
)
def test_models_and_data_that_changed_are_refused(run: Path, change: Callable[[Path], None], what: str) -> None:
    change(run)
    assert what in refused(run)


def test_a_template_with_another_day_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run / "run" / "checkpoints" / "step-1" / "state.json"
    state = json.loads(file.read_text())
    state["run"]["digests"]["the prompts as the student reads them"] = "0" * 64
    file.write_text(json.dumps(state))
    monkeypatch.setattr(checkpoint, "verify", lambda path: None)
    assert "a chat template that writes today's date does this" in refused(run)


def test_another_runs_checkpoint_is_refused(run: Path) -> None:
    settings = json.loads((run / "run" / "config.json").read_text())
    runner.start(configuration.resolve(settings, {"seed": 9}), run / "other").go()
    shutil.rmtree(run / "run" / "checkpoints")
    shutil.copytree(run / "other" / "checkpoints", run / "run" / "checkpoints")
    assert "seed = 0 (it was 9)" in refused(run)


def test_what_only_rounds_or_moves_is_no_other_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and data at another place, another number of steps, other checkpoints, other batches."""
    for name in ("student", "teacher", "data.jsonl"):
        (run / name).rename(run / f"moved-{name}")
    places = {"student": "moved-student", "teacher": "moved-teacher", "data": "moved-data.jsonl"}
    edited(
        run / "run" / "config.json",
        **{key: str(run / place) for key, place in places.items()},
        checkpoint={"every": 1, "keep": 7},
        optimizer={"batch_tokens": 64},
    )
    monkeypatch.setattr(retort, "__version__", "9.9")
    seen = Notes()
    assert runner.resume(run / "run", seen, steps=2).go().step == 2
    said = " | ".join(seen.notes)
    assert "optimizer.batch_tokens = 64 now (it was 16384)" in said
    assert "retort 9.9" in said


def test_a_checkpoint_of_another_format_is_refused_whoever_reads_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run / "run" / "checkpoints" / "step-1"
    good = json.loads((place / "state.json").read_text())
    assert good["format"] == checkpoint.FORMAT

    def never(*_: Any) -> None:
        raise AssertionError("models are loaded for a checkpoint that is refused")

    monkeypatch.setattr(loading, "load", never)
    (place / "weights.safetensors").unlink()  # another format may have other files
    for state, said in [
        ({name: value for name, value in good.items() if name not in ("format", "run")}, "is of format 1, and"),
        (
            {**good, "format": checkpoint.FORMAT + 1},
            f"is of format {checkpoint.FORMAT + 1}, and .* that wrote it \\('{retort.__version__}'\\)$",
        ),
        ({**good, "format": "\x1b[2J\n"}, r"is of format '\\x1b\[2J\\n', and"),
        ({**good, "format": True}, "is of format True, and"),
    ]:
        (place / "state.json").write_text(json.dumps(state))
        digest = hashlib.sha256((place / "state.json").read_bytes()).hexdigest()
        edited(place / "manifest.json", **{"state.json": digest})
        with pytest.raises(UserError, match=said) as caught:
            runner.resume(run / "run", steps=2)
        assert f"goes on from format {checkpoint.FORMAT} only; start the run anew" in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="checkpoint refused: .*is of format"):
            measure(run / "run")
    assert main(["train", "--resume", str(run / "run"), "--steps", "2"]) == 2
    assert main(["report", str(run / "run"), "--out", str(run / "page.html")]) == 0, capsys.readouterr()


def test_a_checkpoint_without_a_key_of_its_format_is_refused(run: Path) -> None:
    place = run / "run" / "checkpoints" / "step-1"
    good = json.loads((place / "state.json").read_text())
    for state, key in [
        *(({name: value for name, value in good.items() if name != key}, key) for key in good if key != "step"),
        ({**good, "adapted": "0"}, "lora"),
        ({**good, "lora": {}}, "lora"),
    ]:
        (place / "state.json").write_text(json.dumps(state))
        digest = hashlib.sha256((place / "state.json").read_bytes()).hexdigest()
        edited(place / "manifest.json", **{"state.json": digest})
        with pytest.raises(
            UserError, match=rf"lacks its '{key}'; there is no earlier" if key != "format" else "format 1"
        ):
            checkpoint.load(place)
