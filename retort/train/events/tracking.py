"""Curves for people who watch them elsewhere: TensorBoard, Weights & Biases or Trackio, through `accelerate.tracking`.

A run writes `metrics.jsonl` and `report.html` whether or not anything here is switched on. In a run of several
processes, only the first one opens a tracker.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retort.errors import UserError, did_you_mean
from retort.ranks import here

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["NAMES", "Tracker", "need", "open_tracker"]

#: Name of a tracker -> what installs it.
NAMES: Mapping[str, str] = {"tensorboard": "retort-distill[track]", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """A destination for the metrics of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends the numbers of one optimizer step."""
        ...

    def close(self) -> None:
        """Sends what is still buffered."""
        ...


def need(name: str | None) -> None:
    """Raises `UserError` if there is no tracker of a name, or the packages behind it are not installed."""
    if name is None:
        return
    if name not in NAMES:
        raise UserError(f"tracker: unknown tracker '{name}'; {did_you_mean(name, NAMES)}")
    for package in ("accelerate", name):
        if importlib.util.find_spec(package) is None:
            install = NAMES["tensorboard"] if package == "accelerate" else NAMES[name]
            raise UserError(f"tracker: '{name}' needs the package {package}: pip install '{install}'")


def open_tracker(name: str | None, *, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Opens a tracker.

    Args:
        name: `tensorboard` (event files in `run_dir/tensorboard`), `wandb` or `trackio` (project `retort`, run named
            like the folder); None for a tracker that does nothing.
        run_dir: Folder of the run.
        config: Resolved configuration; nested keys are joined by dots.

    Raises:
        UserError: Unknown name, or the packages behind it are not installed.
    """
    need(name)
    if name is None or not here().leads:
        return _Nowhere()
    return _Accelerate(_start(name, run_dir), dict(_flat(config)))


def _start(name: str, run_dir: Path) -> GeneralTracker:
    from accelerate import PartialState, tracking

    PartialState()  # The trackers' own log messages fail without it.
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", logging_dir=run_dir)
    run = run_dir.resolve().name
    if name == "wandb":
        return tracking.WandBTracker("retort", name=run, dir=str(run_dir))
    return tracking.TrackioTracker("retort", name=run)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Flattens a nested configuration; what a tracker cannot hold becomes text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)


class _Nowhere:
    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Accelerate:
    def __init__(self, tracker: GeneralTracker, config: dict[str, bool | int | float | str]) -> None:
        self._tracker = tracker
        tracker.start()
        tracker.store_init_configuration(config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()
