"""Runs whose teacher's server fails: they wait, or stop with a checkpoint and one line, and go on from it exactly.

The server is a process of its own that misbehaves as it is told, see `served.Process`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Process

from retort import config as configuration
from retort.controllers.off_policy import adaptive_share
from retort.divergences import reverse_kl
from retort.errors import RetortError, UserError
from retort.estimators import pathwise
from retort.method import Method, Term
from retort.rollout.plan import Replay, RolloutPlan
from retort.train import runner
from retort.train.storage import checkpoint


def slow(*case: str) -> Any:
    """One more case of a kind of which `make test` has some."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def server(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    found = Process(tmp_path_factory.mktemp("server"), model_folder(seed=2, hidden_size=24, padded_to=64))
    yield found
    found.end()


@pytest.fixture
def settings(tiny_run: dict[str, Any], server: Process) -> dict[str, Any]:
    server.fails()
    return tiny_run | {
        "teacher": server.url,
        "method": {"name": "opd"},
        "steps": 3,
        "checkpoint": {"every": 0},
        "eval": {"problems": 0},
        "checks": "skip",
        "server": {"patience": 20.0, "timeout": 20.0},
    }


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """The weights of the run that nothing disturbs, once it was made."""
    return {}


def start(settings: dict[str, Any], folder: Path) -> runner.Run:
    return runner.start(configuration.resolve(settings), folder)


def weights(run: runner.Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def expected(undisturbed: dict[str, bytes], settings: dict[str, Any], folder: Path) -> bytes:
    if not undisturbed:
        undisturbed["opd"] = weights(start(settings, folder).go())
    return undisturbed["opd"]


class FailsAt:
    """Tells the server how to fail once so many steps are done."""

    def __init__(self, step: int, fail: Callable[[], None]) -> None:
        self.step, self.fail = step, fail

    def on_step(self, run: runner.Run, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            self.fail()


def disturbed(settings: dict[str, Any], folder: Path, fail: Callable[[], None]) -> runner.Run:
    run = start(settings, folder)
    run.callbacks = [FailsAt(1, fail)]
    return run


@pytest.mark.parametrize("fault", ["refuse", "cut", *(slow(fault) for fault in ("429", "500", "503", "garbage"))])
def test_what_passes_is_waited_for(
    fault: str, server: Process, settings: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    wanted = expected(undisturbed, settings, tmp_path / "whole")
    run = disturbed(settings, tmp_path / "run", lambda: server.fails(fault, fault))
    assert weights(run.go()) == wanted


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "answers 500"),
        ("nan", "NaN|nan"),
        slow("cut", "cannot be connected to|safetensors"),
        slow("drip", "within 1 seconds"),
        slow("short", "was asked for"),
        slow("high", "log-prob"),
    ],
)
def test_what_does_not_pass_ends_the_run_with_a_checkpoint_from_which_it_goes_on_exactly(
    fault: str,
    words: str,
    server: Process,
    settings: dict[str, Any],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    wanted = expected(undisturbed, settings, tmp_path / "whole")
    impatient = settings | {"server": {"patience": 0.5, "timeout": 1.0 if fault == "drip" else 20.0}}
    run = disturbed(impatient, tmp_path / "run", lambda: server.fails(*[fault] * 20))
    with pytest.raises(RetortError, match=words) as stopped:
        run.go()
    line = str(stopped.value)
    assert "\n" not in line
    assert "everything is saved at step 1 of 3" in line
    assert line.endswith(f"retort train --resume {run.folder}")
    newest = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-1"
    server.fails()
    assert weights(runner.resume(run.folder).go()) == wanted


@pytest.mark.slow
def test_a_server_killed_in_the_middle_is_waited_for_and_another_model_in_its_place_is_refused(
    server: Process,
    settings: dict[str, Any],
    undisturbed: dict[str, bytes],
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    wanted = expected(undisturbed, settings, tmp_path / "whole")
    impatient = settings | {"server": {"patience": 0.3, "timeout": 20.0}}
    run = disturbed(impatient, tmp_path / "run", lambda: server.fails("kill"))
    with pytest.raises(RetortError, match="everything is saved at step 1 of 3"):
        run.go()
    server.fails()
    server.again(model_folder(seed=3, hidden_size=24, padded_to=64))
    with pytest.raises(UserError, match="teacher's weights changed"):
        runner.resume(run.folder)
    server.again()
    assert weights(runner.resume(run.folder).go()) == wanted

    run = disturbed(settings, tmp_path / "other", lambda: server.again(model_folder(seed=3, hidden_size=24)))
    with pytest.raises(UserError, match="other weights than the run began with.*everything is saved at step 1"):
        run.go()
    server.again()
    assert weights(runner.resume(run.folder).go()) == wanted


def probed_method() -> Method:
    """It goes by a probe of the teacher after every second step."""
    share = adaptive_share(reverse_kl(), every=2, prompts=4, margin=-100.0, rise=0.25)
    return Method(
        name="probed",
        rollout=RolloutPlan(on_policy_fraction=share.read("share"), replay=Replay(capacity=6)),
        terms=(Term("reverse", pathwise(reverse_kl())),),
        controllers=(share,),
    )


def test_a_server_that_is_gone_when_a_step_is_learnt_and_probed_costs_neither_the_step_nor_the_probe(
    server: Process, settings: dict[str, Any], tmp_path: Path
) -> None:
    del settings["method"]
    impatient = settings | {"server": {"patience": 0.3, "timeout": 20.0}, "steps": 4}
    method = probed_method()
    whole = runner.start(configuration.resolve(impatient, own=method), tmp_path / "whole", method=method).go()
    run = runner.start(configuration.resolve(impatient, own=method), tmp_path / "run", method=method)
    measure = run.probes.measure

    def measured(method: Method, probe: Any, clock: Any) -> dict[str, float]:
        if clock.step == 2:
            server.end()
        return measure(method, probe, clock)

    run.probes.measure = measured  # type: ignore[method-assign]
    with pytest.raises(RetortError, match="cannot be connected to.*everything is saved at step 2 of 4, go on with"):
        run.go()
    assert [row["step"] for row in run.metrics] == [1, 2] and "probe/off_policy.loss" not in run.metrics[1]
    server.again()
    resumed = runner.resume(run.folder, method=method).go()
    assert weights(resumed) == weights(whole)
    assert resumed.metrics[2]["probe/off_policy.loss"] == whole.metrics[1]["probe/off_policy.loss"]
    kept = ("loss", "grad_norm", "control/off_policy.share")
    assert [[row[name] for name in kept] for row in resumed.metrics] == [
        [row[name] for name in kept] for row in whole.metrics
    ]
