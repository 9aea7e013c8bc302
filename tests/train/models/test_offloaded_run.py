"""Runs whose frozen models leave the device between passes: the same to the bit, one model here at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retort import api
from retort import config as configuration
from retort.config.toml import overrides
from retort.errors import UserError
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel
from retort.preflight.checks import check_memory
from retort.train import runner
from retort.train.models import offloading
from retort.train.output.summary import summary
from retort.train.run import Run
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import prepare

DISK = {"offload": "disk"}


class Watching:
    """Looks at models when a step is done, and at all of them whenever one computes."""

    def __init__(self) -> None:
        self.after_steps: list[bool] = []
        self.at_passes: set[tuple[bool, ...]] = set()
        self.lms: list[LanguageModel] = []

    def on_step(self, run: Run, metrics: dict[str, Any]) -> None:
        self.after_steps += [any(gone(lm) for lm in self.lms)]

    def over(self, run: Run) -> Run:
        run.callbacks = [self]
        self.lms = [lm for lm in run.prepared.teachers.lms.values() if lm.offload.storage]
        for lm in self.lms:
            lm.model.base_model.layers[0].register_forward_pre_hook(self._look)
        return run

    def _look(self, *_: Any) -> None:
        self.at_passes.add(tuple(not gone(lm) for lm in self.lms))


def gone(lm: LanguageModel) -> bool:
    """Whether no weight but the head's has memory."""
    heads = {id(part) for part in lm.head().parts}
    return all(p.is_meta for p in lm.model.parameters() if id(p) not in heads)


def rows(run: Run) -> list[dict[str, Any]]:
    clock = ("time/", "tokens_per_second")
    return [{name: x for name, x in row.items() if not name.startswith(clock)} for row in run.metrics]


def same(one: Run, other: Run) -> bool:
    """Whether two runs came to the same numbers, the same table and the same student, to the last bit."""
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (one, other)]
    tables = [json.loads((run.folder / "eval.json").read_text()) for run in (one, other)]
    alike = all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    return alike and rows(one) == rows(other) and tables[0] == tables[1]


def started(settings: dict[str, Any], folder: Path, watching: Watching | None = None) -> Run:
    run = runner.start(api.assemble(settings), folder)
    return run.go() if watching is None else watching.over(run).go()


def test_a_run_is_the_same_to_the_bit_and_its_teacher_is_gone_while_it_learns(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    plain, watching = started(tiny_run, tmp_path / "plain"), Watching()
    run = started({**tiny_run, "models": {"teacher": DISK}}, tmp_path / "away", watching)
    assert same(plain, run)
    assert watching.after_steps == [True] * 4 and watching.at_passes == {(True,)}
    assert configuration.read_json(run.folder / "config.json").models["teacher"].offload == "disk"
    half = Path(shutil.copytree(run.folder, tmp_path / "half"))
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step-4")
    resumed = watching.over(runner.resume(half))
    assert resumed.step == 2 and gone(watching.lms[0])
    assert same(plain, resumed.go())


def test_two_teachers_are_never_here_together(
    tiny_run: dict[str, Any], tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    paths = {"a": tiny_run.pop("teacher"), "b": str(model_folder(seed=3))}

    def of(**more: Any) -> dict[str, Any]:
        models = {name: {"path": path, **more} for name, path in paths.items()}
        teachers = {"models": ["a", "b"], "combine": "mixture", "weights": [1, 2]}
        return {**tiny_run, "models": models, "teachers": teachers}

    watching = Watching()
    plain, run = started(of(), tmp_path / "plain"), started(of(**DISK), tmp_path / "away", watching)
    assert same(plain, run)
    assert watching.at_passes == {(True, False), (False, True)}
    assert watching.after_steps == [True] * 4


@pytest.mark.parametrize(
    "method", [{"name": "decoupled_kl", "prefix": "teacher"}, {"name": "gopd"}], ids=["writes", "base"]
)
def test_a_teacher_that_writes_and_a_base_leave_too(
    tiny_run: dict[str, Any], tmp_path: Path, model_folder: Callable[..., Path], method: dict[str, Any]
) -> None:
    settings = {**tiny_run, "method": method, "steps": 2}
    if method["name"] == "gopd":
        settings["base"] = str(model_folder(seed=3))
    names = ["teacher", *(["base"] if "base" in settings else [])]
    watching = Watching()
    plain = started(settings, tmp_path / "plain")
    run = started({**settings, "models": dict.fromkeys(names, DISK)}, tmp_path / "away", watching)
    assert same(plain, run) and len(watching.lms) == len(names)
    assert all(sum(here) == 1 for here in watching.at_passes)


def test_it_is_said_and_counted(tiny_run: dict[str, Any], tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    small, large = model_folder(seed=3), model_folder(seed=4, intermediate_size=256)
    teacher = tiny_run.pop("teacher")

    def of(**more: Any) -> Any:
        models = {name: {"path": str(path), **more} for name, path in (("a", teacher), ("b", small), ("c", large))}
        return prepare(
            api.assemble({**tiny_run, "models": models, "teachers": {"models": ["a", "b", "c"], "combine": "mixture"}})
        )

    plain, away = of(), of(**DISK)
    sizes = {name: lm.offload.bytes for name, lm in away.teachers.lms.items()}
    before, after = forecast(plain), forecast(away)
    assert sizes["c"] > sizes["a"] and sizes["c"] > sizes["b"] > 0
    assert after.offloaded == sizes["c"], "the greatest, not the sum"
    assert after.models == before.models - sum(sizes[name] for name in "abc") and before.offloaded == 0
    assert after.loaded == before.loaded - sum(sizes[name] for name in "abc")
    assert before.peak - sum(sizes[name] for name in "abc") <= after.peak < before.peak
    assert "the largest model that is there for its passes only" in str(after)
    assert "passes only" not in str(before)
    assert "the largest model that is there for its passes only" in check_memory(away).saw
    assert all("in its files between passes" in summary(away)[f"model '{name}'"] for name in "abc")
    single = prepare(api.assemble({**tiny_run, "teacher": teacher, "models": {"teacher": DISK}}))
    assert summary(single)["teacher"].endswith("in its files between passes")


def test_what_cannot_leave_is_refused_in_a_line(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(name: str, storage: str, **more: Any) -> None:
        prepare(api.assemble({**tiny_run, "models": {name: {"offload": storage}}, **more}))

    with pytest.raises(UserError, match="student .*: offload = disk is for frozen models, and the student learns"):
        of("student", "disk")
    with pytest.raises(UserError, match="teacher .*: offload = cpu changes nothing in a run on a CPU.*offload=disk"):
        of("teacher", "cpu")
    with pytest.raises(UserError, match="base .*: offload = cpu changes nothing"):
        of("base", "cpu", method={"name": "gopd"}, base=tiny_run["student"])
    with pytest.raises(UserError, match=r"models.base.offload is for a model with weights of its own"):
        of("base", "disk", method={"name": "gopd"}, base=tiny_run["student"], lora={"rank": 2})
    with pytest.raises(UserError, match="models.teacher.offload: Input should be 'none', 'cpu' or 'disk'"):
        of("teacher", "gpu")
    with pytest.raises(UserError, match="unknown key 'models.teacher.ofload'; .*may have bits and offload"):
        api.assemble({**tiny_run, "models": {"teacher": {"ofload": "disk"}}})
    file, held = tmp_path / "x.gguf", InMemoryModel(None, None)  # type: ignore[arg-type]
    file.write_bytes(b"GGUF")
    settings = {**tiny_run, "models": {"teacher": DISK}}
    config = api.assemble(settings)
    for source, complaint in (
        (held, "is for models in a folder, and this one is given as it is"),
        (str(file), "is for safetensors, and this is a GGUF file"),
        (object(), "is for weights that are loaded here, and a server holds these"),
    ):
        with pytest.raises(UserError, match=f"teacher x: offload = disk {complaint}"):
            offloading.refuse_offload(config, {"teacher": ("x", source)})  # type: ignore[dict-item]
    rounded = api.assemble({**settings, "models": {"teacher": {**DISK, "bits": 8}}})
    with pytest.raises(UserError, match="offload = disk is for whole weights, and bits rounds these"):
        offloading.refuse_offload(rounded, {"teacher": ("x", "x")})
    monkeypatch.setattr(offloading, "here", lambda: type("World", (), {"size": 2}))
    sharded = api.assemble({**settings, "ranks": {"teacher": "sharded"}})
    with pytest.raises(UserError, match="offload = disk with ranks.teacher = sharded: .*ranks.teacher=replicated"):
        offloading.refuse_offload(sharded, {"teacher": ("x", "x")})


@pytest.mark.parametrize("storage", ["disk", "none"])
def test_the_command_line_says_it_too(tiny_run: dict[str, Any], storage: str) -> None:
    found = api.assemble(configuration.merge(tiny_run, overrides([f"models.teacher.offload={storage}"])))
    assert found.models["teacher"].offload == storage
    assert found.models["teacher"].model_dump() == ({} if storage == "none" else {"offload": storage})
