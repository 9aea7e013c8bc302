"""What a run with a served teacher tells its user, what it checks from time to time, and evaluations that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Process, in_thread

from retort import config as configuration
from retort.errors import UnreachableError, UserError
from retort.models.load import load_model
from retort.train import runner
from retort.train.events.observe import Silent


class Watching(Silent):
    """Keeps the notes of a run, and does something as a certain evaluation of the student begins."""

    def __init__(self, number: int = 0, do: Callable[[], None] = lambda: None) -> None:
        self.number, self.do, self.begun, self.notes = number, do, 0, list[str]()

    def phase(self, text: str, done: int, total: int) -> None:
        if text == "evaluating the student" and done == 0:
            self.begun += 1
            if self.begun == self.number:
                self.do()

    def note(self, text: str) -> None:
        self.notes.append(text)


class After:
    """Does something once so many steps are done."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            self.do()


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=2, hidden_size=24, padded_to=64)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    found = Process(tmp_path_factory.mktemp("server"), folder)
    yield found
    found.end()


@pytest.fixture
def settings(tiny_run: dict[str, Any]) -> dict[str, Any]:
    return tiny_run | {"method": {"name": "opd"}, "checkpoint": {"every": 0}, "eval": {"problems": 0}, "checks": "skip"}


def start(settings: dict[str, Any], folder: Path, observer: Silent | None = None) -> runner.Run:
    return runner.start(configuration.resolve(settings), folder, observer)


def weights(run: runner.Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def scale(lm: Any, factor: float) -> None:
    """Changes a model in place: its server goes on describing it as before, digest and all."""
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(factor)


@pytest.mark.parametrize("factor", [1.0001, 1.5])
def test_weights_that_change_under_a_server_are_found_by_the_next_check(
    factor: float, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as url:
        changed = settings | {"teacher": url, "steps": 3, "server": {"check_every": 2}}
        run = start(changed, tmp_path / "run")
        run.callbacks = [After(1, lambda: scale(lm, factor))]
        if factor < 1.1:
            assert run.go().step == 3, "the check allows for rounding"
            return
        with pytest.raises(UserError, match=r"another model than before .*server.tolerance is 0.02") as stopped:
            run.go()
        assert "\n" not in str(stopped.value)
        assert f"everything is saved at step 2 of 3, go on with: retort train --resume {run.folder}" in str(
            stopped.value
        )
        with pytest.raises(UserError, match="step-2: .*another model than before"):
            runner.resume(run.folder)
        scale(lm, 1 / factor)
        assert runner.resume(run.folder).go().step == 3


def test_the_tolerance_of_the_check_is_the_users(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as url:
        server = {"check_every": 1, "tolerance": 100.0}
        run = start(settings | {"teacher": url, "steps": 2, "server": server}, tmp_path / "run")
        run.callbacks = [After(1, lambda: scale(lm, 1.5))]
        assert run.go().step == 2


def test_the_user_reads_once_that_a_server_is_waited_for(
    settings: dict[str, Any], server: Process, tmp_path: Path
) -> None:
    watching = Watching()
    patient = settings | {"teacher": server.url, "steps": 2, "server": {"patience": 20.0}}
    run = start(patient, tmp_path / "run", watching)
    server.fails("503", "503", "-", "503")
    run.go()
    (line,) = [note for note in watching.notes if "503" in note]
    assert line == f"{server.url}: it answers 503: not now; it is asked again for up to 20 seconds"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step"), [(1, 0), (2, 2), (3, 3)], ids=["before", "between", "after"])
def test_a_server_killed_during_an_evaluation_ends_the_run_and_it_goes_on_exactly(
    number: int, step: int, settings: dict[str, Any], server: Process, tmp_path: Path
) -> None:
    evaluation = {"problems": 4, "samples": 2, "every": 2, "top_p": 1.0, "max_new_tokens": 6}
    evaluated = settings | {"teacher": server.url, "steps": 3, "eval": evaluation, "server": {"patience": 0.3}}
    whole = start(evaluated, tmp_path / "whole").go()
    run = start(evaluated, tmp_path / "run", Watching(number, lambda: server.fails("kill")))
    with pytest.raises(UnreachableError, match=f"everything is saved at step {step} of 3") as stopped:
        run.go()
    assert "\n" not in str(stopped.value)
    assert str(stopped.value).endswith(f"go on with: retort train --resume {run.folder}")
    server.again()
    resumed = runner.resume(run.folder).go()
    assert weights(resumed) == weights(whole)
    tables = [json.loads((one.folder / "eval.json").read_text()) for one in (resumed, whole)]
    assert tables[0] == tables[1]
    assert [row["step"] for row in resumed.metrics] == [row["step"] for row in whole.metrics] == [1, 2, 3]
