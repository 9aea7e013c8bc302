"""`precision = "auto"`: a fixed rule on a CPU, measured on the pair on a GPU; advice names the setting."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort import config as configuration
from retort.core.rollouts import Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.models.lm import best_precision
from retort.models.load import load_model
from retort.preflight import trial
from retort.train.models import models, precision
from retort.train.setup import memory
from retort.train.setup.prepare import prepare

PROMPTS = [TokenSequence.of([5 + n, 45, 7]) for n in range(6)]


def load(folder: Path, role: str) -> Any:
    return load_model(str(folder), role=role, precision="bf16", device=torch.device("cpu"))  # type: ignore[arg-type]


@pytest.fixture
def near(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A teacher that is hardly another one than the student (`model_folder(seed=1)`)."""
    folder = Path(shutil.copytree(model_folder(seed=1), tmp_path / "near"))
    weights = load_file(folder / "model.safetensors")
    head = next(name for name in weights if "embed_tokens" in name)
    weights[head][7] += 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_on_a_cpu_it_is_fp32_whatever_the_processor_multiplies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert best_precision(torch.device("cpu")) == "fp32"
    for supported, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert best_precision(torch.device("cuda")) == wanted


def test_bf16_is_kept_where_there_is_more_to_learn_than_it_rounds_away(
    model_folder: Callable[..., Path], near: Path
) -> None:
    student = load(model_folder(seed=1), "student")
    for teacher, wanted in ((near, "fp32"), (model_folder(seed=2), "bf16")):
        chosen, note = precision.settle(student, load(teacher, "teacher"), PROMPTS, 0)
        noise, apart = precision.measured(student, load(teacher, "teacher"), PROMPTS, 0)
        assert noise > 0
        assert (chosen, apart < 3 * noise) == (wanted, wanted == "fp32")
        assert note.startswith(f"precision is {wanted} (auto)")
    assert student.precision == "bf16"
    chosen, note = precision.settle(student, None, PROMPTS, 0)
    assert (chosen, "precision=fp32" in note) == ("bf16", True)
    assert precision.settle(student, None, [TokenSequence.of([])], 0)[0] == "bf16"


def test_a_run_whose_pair_refuses_bf16_is_in_fp32_on_both_sides(
    tiny_run: dict[str, Any], near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "best_precision", lambda device: "bf16")
    for teacher, wanted in ((str(near), "fp32"), (tiny_run["teacher"], "bf16")):
        sections = {"precision": "auto", "teacher": teacher}
        made = prepare(configuration.resolve(configuration.merge(tiny_run, sections)))
        assert made.student.precision == made.config.precision == wanted
        teacher_lm = made.teachers.lms["teacher"]
        assert teacher_lm.precision == wanted
        assert teacher_lm.model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
        assert sum(note.startswith(f"precision is {wanted} (auto)") for note in made.notes) == 1


def test_advice_about_noise_names_the_setting_where_it_helps() -> None:
    one = torch.ones(4)
    rollout = Rollout(Prompt("x", ()), TokenSequence.of([0]).then([1, 2, 3, 4], decided=True), engine_logp_A=one)
    pack = Pack.of([rollout])
    for chosen in ("bf16", "fp32"):
        noisy = trial.Trial(pack, {"student_logp": one + 0.1}, 4, chosen)  # type: ignore[arg-type]
        check = trial.check_noise_floor(noisy)
        assert check.verdict == "warn"
        assert ("precision=fp32" in check.remedy) == (chosen == "bf16")
        found = {"overlap_mass": 1.0, "overlap_ratio": 1.0, "overlap_teacher_mass": 1.0, "reverse_kl": 0.01}
        ((_, _, remedy),) = trial._doubts(found, noisy)
        assert ("precision=fp32" in remedy) == (chosen == "bf16")


def test_the_memory_forecast_counts_copies_to_write_with(tiny_run: dict[str, Any]) -> None:
    found = {}
    for chosen in ("fp32", "bf16"):
        made = prepare(configuration.resolve(configuration.merge(tiny_run, {"precision": chosen})))
        found[chosen] = memory.forecast(made)
    # Two bytes for every weight that is multiplied by: all but embedding and norms.
    rows = sum(p.numel() for name, p in made.student.model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert (found["fp32"].copies, found["bf16"].copies) == (0, 2 * rows)
    assert "weights in bf16" in str(found["bf16"])
    huge = replace(found["bf16"], copies=10**12)
    assert huge.peak == huge.models + huge.training + huge.copies + huge.cache
