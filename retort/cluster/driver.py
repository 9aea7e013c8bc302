"""The driver of a run in a cluster: places its processes, shows what the first rank says, and starts it again."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retort import config as configuration
from retort.cluster import guard
from retort.cluster.connect import connected
from retort.cluster.crew import Crew, LostError
from retort.cluster.job import Job, Watcher
from retort.cluster.resources import Layout, Machine, layout
from retort.config import Config
from retort.config.resumed import resumed
from retort.envs.elsewhere import addresses
from retort.errors import RunError, UserError
from retort.files import named
from retort.train.storage import checkpoint
from retort.train.storage.folder import refuse_held
from retort.wire import is_url

#: Seconds between two looks at the actors.
_EVERY = 0.2
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def drive(
    job: Job,
    address: str | None,
    observer: Watcher,
    show: Callable[[str], Any],
    *,
    cluster: Mapping[str, Any] | None = None,
) -> None:
    """Makes a run in a cluster to its end.

    Args:
        job: The run.
        address: Of the cluster's head; None: a new cluster of this machine.
        observer: Receives what the first rank's would.
        show: Takes the lines that say where the model and the report are.
        cluster: Settings of the section `cluster` of a run that is resumed, for this time.

    Raises:
        UserError: As `perform`; or there is no such cluster, or it has too little.
        RunError: The run had to stop.
    """
    plan = Plan.of(job, address, cluster or {})
    observer.working(f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine")
    with connected(address, dashboard=plan.config.cluster.dashboard) as ray:
        Drive(ray, plan, observer, show).go(job)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        config: Its settings.
        folder: Its folder.
        given: What `--cluster` was given.
    """

    config: Config
    folder: Path
    given: str

    @staticmethod
    def of(job: Job, address: str | None, cluster: Mapping[str, Any]) -> Plan:
        """Reads the settings of a job.

        Raises:
            UserError: They are wrong, or no teacher can be served as they ask.
        """
        from retort import api

        if job.resume is not None:
            folder, _ = checkpoint.find(named(job.resume))
            config = resumed(configuration.read_json(folder / "config.json"), job.changed)
            again = {**config.cluster.model_dump(), **cluster}
            config = config.model_copy(update={"cluster": configuration.resolve({"cluster": again}).cluster})
        else:
            config = api.assemble(*job.layers)
            folder = api.folder_of(config).resolve()
        plan = Plan(config, folder, address or "auto")
        plan.check()
        return plan

    @property
    def advice(self) -> str:
        """How the run goes on after it was lost."""
        if not (self.folder / "config.json").is_file():
            return "nothing was saved yet: start it again"
        return f"go on with: retort train --cluster {self.given} --resume {self.folder}"

    def check(self) -> None:
        """Refuses servers of a teacher, or of an environment, that there is not.

        Raises:
            UserError: That.
        """
        config, count = self.config, self.config.cluster.teachers
        problem = None
        if count and config.teachers.models:
            problem = "teachers.models has several of them"
        elif count and config.teacher is None:
            problem = "this run has none"
        elif count and is_url(str(config.teacher)):
            problem = f"{config.teacher} is a server already"
        elif count and "teacher" in config.models and config.models["teacher"].bits is not None:
            problem = "a server does not round its weights (models.teacher.bits)"
        elif count and config.ranks.teacher == "sharded":
            problem = "ranks.teacher = sharded has the ranks hold it"
        if problem is not None:
            raise UserError(f"cluster.teachers = {count} asks for servers of `teacher`, and {problem}; set it to 0")
        played = config.environment
        if config.cluster.environments and (played is None or addresses(played)):
            problem = "this run has none" if played is None else f"{played} is a server already"
            raise UserError(
                f"cluster.environments = {config.cluster.environments} asks for servers of the environment, and "
                f"{problem}; set it to 0"
            )


class Drive:
    """Starts the processes of a run as often as it takes."""

    def __init__(self, ray: Any, plan: Plan, observer: Watcher, show: Callable[[str], Any]) -> None:
        self._ray, self._plan, self._observer, self._show = ray, plan, observer, show
        self.layout = self._laid_out()

    def go(self, job: Job) -> None:
        """Makes the run to its end.

        Raises:
            RetortError: See `drive`.
        """
        plan, tries, newest = self._plan, 0, self._newest()
        if job.resume is None:
            job = replace(job, layers=(*job.layers, {"out": str(plan.folder)}))
        while True:
            guard.advise(plan.advice)
            try:
                with self._advising() if tries else contextlib.nullcontext():
                    return self._once(job)
            except LostError as error:
                tries = tries + 1 if self._newest() == newest else 1
                newest = self._newest()
                if tries > plan.config.cluster.retries:
                    raise RunError(f"{error}; {plan.advice}") from None
                since = newest.name if newest else "its start"
                self._observer.close()
                self._observer.note(f"{error}; the run goes on from {since}")
                job = job.again(plan.folder)
                self._wait_for_folder()
                with self._advising():
                    # Ranks that were asked for are waited for; others are as many as there are machines or GPUs now.
                    self.layout = self.layout if plan.config.cluster.ranks else self._laid_out()

    def _laid_out(self) -> Layout:
        """What is started on the machines that there are.

        Raises:
            UserError: They have too little.
        """
        nodes = [
            node["Resources"] | {"host": node["NodeManagerAddress"]} for node in self._ray.nodes() if node["Alive"]
        ]
        machines = [Machine(node["host"], node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        return layout(self._plan.config, machines)

    def _wait_for_folder(self) -> None:
        """Waits until the first rank, which may hang or be cut off, has let go of the run's folder."""
        ends = time.monotonic() + 2 * self._plan.config.cluster.hangs
        while time.monotonic() < ends:
            try:
                return refuse_held(self._plan.folder)
            except UserError:  # also where the folder is away: the first rank says so
                time.sleep(_EVERY)

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Within, what a cluster has become too small for ends with the command to go on with."""
        try:
            yield
        except UserError as error:
            raise RunError(f"{error}; {self._plan.advice}") from None

    def _newest(self) -> Path | None:
        return checkpoint.newest(self._plan.folder / "checkpoints")

    def _once(self, job: Job) -> None:
        crew = Crew(self._ray, self._plan.config, self.layout, self._observer.note)
        try:
            with contextlib.closing(crew), self._signals(crew):
                crew.start(job, self._plan.given)
                while not crew.finished(_EVERY):
                    self._deliver(crew)
                    guard.advise(self._plan.advice)
        except LostError as error:
            if crew.asked_to_stop:
                raise RunError(f"{error}; {self._plan.advice}") from None
            raise
        finally:
            self._observer.close()

    def _deliver(self, crew: Crew) -> None:
        for name, arguments in crew.events():
            if name == "show":
                self._observer.close()
                self._show(*arguments)
            else:
                getattr(self._observer, name)(*arguments)

    @contextlib.contextmanager
    def _signals(self, crew: Crew) -> Iterator[None]:
        """Within, two signals are passed to the first rank; a third ends everything."""

        def passed(number: int, frame: Any) -> None:
            if not crew.signal(number):
                raise KeyboardInterrupt

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            for number, old in before.items():
                if old is not signal.SIG_IGN:
                    signal.signal(number, passed)
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
