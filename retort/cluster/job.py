"""What one process of `retort train` does, by itself, under torchrun or as an actor of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from retort.errors import visible
from retort.train.events.observe import Observer, Silent


class Watcher(Observer, Protocol):
    """An observer of a whole command."""

    def working(self, text: str) -> None:
        """Receives what takes a while and reports no progress."""
        ...

    def close(self) -> None:
        """Ends the display."""
        ...


@dataclass(frozen=True)
class Job:
    """A run to start or to go on with.

    Attributes:
        layers: Nested settings of a new run, later ones win; of none that is resumed.
        resume: Folder of a run to go on with, or of one of its checkpoints; None: a new run.
        steps: A new number of steps of a resumed run.
        changed: What a resumed run may spend, by the full name of the setting.
    """

    layers: Sequence[Mapping[str, Any]] = ()
    resume: str | None = None
    steps: int | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)

    def again(self, folder: Path) -> Job:
        """The job of going on with the run, once its folder holds it; before that the same job."""
        if not (folder / "config.json").is_file():
            return self
        return replace(self, layers=(), resume=str(folder), changed={} if self.resume is None else self.changed)


def perform(job: Job, observed: Callable[[bool], Watcher], show: Callable[[str], Any]) -> None:
    """Makes a run to its end, with its report.

    Args:
        job: The run.
        observed: Makes the observer of a process; takes whether it is the first rank, which alone is watched.
        show: Takes the lines that say where the model and the report are.

    Raises:
        UserError: Anything about the input is wrong.
        RunError: The run had to stop.
    """
    from retort import api, ranks
    from retort.files import named
    from retort.train import runner

    leads = ranks.join().leads
    observer = observed(leads)
    try:
        if job.resume is not None:
            observer.working("reading the run and loading its models")
            run = runner.resume(named(job.resume), observer, steps=job.steps, changed=job.changed)
        else:
            settings = api.assemble(*job.layers)
            observer.working("reading the data and loading the models")
            run = runner.start(settings, api.folder_of(settings), observer)
            api.check(run)
        run.go()
    finally:
        observer.close()
    if leads:
        page = api.write_report(run.folder)
        show(visible(f"model:  {run.folder / 'model'}") + "\n" + visible(f"report: {page}"))


class Quiet(Silent):
    """A watcher that shows nothing."""

    def working(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
