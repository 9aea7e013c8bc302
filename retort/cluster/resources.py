"""How many processes a run has in a cluster, and what each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from retort.config import Config
from retort.errors import UserError, counted


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster: its address, CPUs and GPUs."""

    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Layout:
    """How many processes there are, and the resources of each, as Ray names them."""

    ranks: int
    rank: dict[str, float]
    teachers: int
    teacher: dict[str, float]
    workers: int = 0
    worker: dict[str, float] = field(default_factory=lambda: {})
    environments: int = 0
    environment: dict[str, float] = field(default_factory=lambda: {})

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The resources of every process: the ranks first."""
        return [needs for _, count, needs in self.roles for _ in range(count)]

    @property
    def roles(self) -> list[tuple[str, int, dict[str, float]]]:
        """The name of each kind of process, how many there are, and what each needs."""
        return [
            ("rank", self.ranks, self.rank),
            ("teacher", self.teachers, self.teacher),
            ("worker", self.workers, self.worker),
            ("environment", self.environments, self.environment),
        ]


def layout(config: Config, machines: Sequence[Machine]) -> Layout:
    """The processes of a run.

    Args:
        config: Its settings.
        machines: What the cluster consists of, in use or not.

    Raises:
        UserError: The cluster has too little for it.
    """
    asked = config.cluster
    there = sum(machine.gpus for machine in machines)
    if config.device == "cuda" and not there:
        raise UserError("device = cuda, and the cluster has no GPU; set device=cpu, or add a machine with GPUs to it")
    on_gpus = config.device != "cpu" and there > 0
    teacher_gpus = asked.teacher_gpus if asked.teacher_gpus is not None else 1
    rank = {"CPU": float(asked.rank_cpus), "GPU": 1.0 if on_gpus else 0.0}
    teacher = {"CPU": float(asked.teacher_cpus), "GPU": float(teacher_gpus if on_gpus else 0)}
    workers = config.rollout.placed
    worker_gpus = asked.worker_gpus if asked.worker_gpus is not None else 1
    if worker_gpus > 1 and config.rollout.engine != "vllm":
        raise UserError(
            f"cluster.worker_gpus = {worker_gpus} is for rollout.engine=vllm; a worker that runs the own loop computes "
            "on one: set it to 1"
        )
    worker = {"CPU": float(asked.worker_cpus), "GPU": float(worker_gpus if on_gpus else 0)}
    left = int(there - asked.teachers * teacher["GPU"] - workers * worker["GPU"])
    ranks = asked.ranks or (max(1, left) if on_gpus else len(machines))
    environment = {"CPU": float(asked.environment_cpus)}
    found = Layout(
        ranks=ranks,
        rank=_some(rank),
        teachers=asked.teachers,
        teacher=_some(teacher),
        workers=workers,
        worker=_some(worker),
        environments=asked.environments,
        environment=environment,
    )
    _fits(found, machines)
    return found


def _some(resources: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount}


def _fits(found: Layout, machines: Sequence[Machine]) -> None:
    has = {"CPU": [machine.cpus for machine in machines], "GPU": [machine.gpus for machine in machines]}
    roles = [role for role in found.roles if role[1]]
    for kind, amounts in has.items():
        for name, _, needs in roles:
            if needs.get(kind, 0) > max(amounts):
                raise UserError(
                    f"cluster.{name}_{kind.lower()}s = {needs[kind]:g}, and the largest machine of the cluster has "
                    f"{max(amounts):g} {kind}s; ask for fewer"
                )
        wanted, there = sum(count * needs.get(kind, 0) for _, count, needs in roles), sum(amounts)
        # A machine cannot lend half of a process to another.
        room = (
            sum(amount // min(needs[kind] for *_, needs in roles if kind in needs) for amount in amounts)
            if wanted
            else 0
        )
        count = sum(count for _, count, needs in roles if needs.get(kind, 0))
        if wanted > there or count > room:
            parts = " and ".join(f"{counted(count, name)} of {needs.get(kind, 0):g}" for name, count, needs in roles)
            raise UserError(
                f"the run needs {wanted:g} {kind}s ({parts}), and the cluster has {there:g} on "
                f"{counted(len(machines), 'machine')}; lower the number of ranks, servers or workers, or add machines"
            )
