import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retort.errors import UserError
from retort.train.events import tracking
from retort.train.events.tracking import open_tracker

CONFIG = {"seed": 0, "method": {"name": "eopd", "clip": None, "entropy_threshold": 0.8}, "stop": ["a", "b"]}


def test_none_tracks_nowhere(tmp_path: Path) -> None:
    tracker = open_tracker(None, run_dir=tmp_path, config=CONFIG)
    tracker.log({"loss": 1.0}, step=1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracker: unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        open_tracker("tensorbord", run_dir=tmp_path, config={})


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("wandb", "wandb", "pip install 'wandb'"),
        ("tensorboard", "tensorboard", r"pip install 'retort-distill\[track\]'"),
        ("trackio", "accelerate", r"pip install 'retort-distill\[track\]'"),
    ],
)
def test_missing_package_is_refused_with_the_remedy(
    name: str, missing: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == missing else object())
    with pytest.raises(UserError, match=f"tracker: '{name}' needs the package {missing}: {remedy}"):
        open_tracker(name, run_dir=tmp_path, config={})


def test_config_is_flattened_to_what_a_tracker_holds() -> None:
    assert dict(tracking._flat(CONFIG)) == {
        "seed": 0,
        "method.name": "eopd",
        "method.clip": "None",
        "method.entropy_threshold": 0.8,
        "stop": "['a', 'b']",
    }


def test_tensorboard_holds_the_numbers_and_the_config(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", run_dir=tmp_path, config=CONFIG)
    tracker.log({"loss": 0.5, "loss/reverse": 0.25}, step=1)
    tracker.log({"loss": 0.375}, step=2)
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.375)]
    assert [event.value for event in events.Scalars("loss/reverse")] == [0.25]
    assert "entropy_threshold: 0.8" in next(tmp_path.rglob("hparams.yml")).read_text()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_the_numbers_and_the_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = pytest.importorskip("accelerate").PartialState
    monkeypatch.setattr(state, "_shared_state", {})  # as in a fresh process
    said: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: said.append((values, step)), finish=lambda: said.append("finished"))
    service = SimpleNamespace(
        init=lambda **options: said.append((options["project"], options["name"])) or run,
        config=SimpleNamespace(update=lambda values, allow_val_change: said.append(values)),
    )
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())

    tracker = open_tracker(name, run_dir=tmp_path / "mine", config={"a": {"b": 1}})
    tracker.log({"loss": 0.5}, step=3)
    tracker.close()
    assert said == [("retort", "mine"), {"a.b": 1}, ({"loss": 0.5}, 3), "finished"]
