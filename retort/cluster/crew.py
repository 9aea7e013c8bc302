"""The actors of a run: placed, started, watched, and ended together."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from retort.cluster.job import Job
from retort.cluster.mailbox import Mailbox
from retort.cluster.rank import Outcome, Rank, Where
from retort.cluster.resources import Layout
from retort.cluster.service import Service, services, variables
from retort.config import Config
from retort.errors import RetortError, RunError, UserError, shortened
from retort.ranks import CLUSTER

#: Seconds for the other ranks to end, or to be found dead, once one has failed.
_AFTER = 10.0
#: Seconds between two looks at the servers.
_LOOK = 1.0
#: Variables that actors get from the command, by how their names begin.
_PASSED = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "NCCL_", "GLOO_", "TORCH_")
_LOCAL = "127.0.0.1"


class LostError(Exception):
    """An actor is gone without having ended."""


class Crew:
    """All actors of one start of a run.

    Example:
        >>> crew = Crew(ray, config, layout, print)  # doctest: +SKIP
        >>> crew.start(job, "auto")  # doctest: +SKIP
        >>> while not crew.finished(0.2):  # doctest: +SKIP
        ...     print(crew.events())
    """

    def __init__(self, ray: Any, config: Config, layout: Layout, note: Callable[[str], Any]) -> None:
        """Starts nothing yet.

        Args:
            ray: The module, connected.
            config: Settings of the run.
            layout: How many actors, and what they need.
            note: Takes a line for the user.
        """
        self._ray, self._config, self._layout, self._note = ray, config, layout, note
        self._folder, self._key = os.getcwd(), _key(config)
        self._group: Any = None
        self._mailbox: Any = None
        self._ranks: list[Any] = []
        self._services: list[Service] = []
        self._servers: list[Any] = []
        self._where: list[Where] = []
        self._running: dict[Any, int] = {}
        self._serving: dict[Any, int] = {}
        self._at: list[tuple[str, int]] = []
        self._nodes: list[str] = []
        self._looked = self._signalled = 0.0

    def start(self, job: Job, given: str) -> None:
        """Has all actors placed, what is shared served, and the ranks begin.

        Args:
            job: What the ranks do.
            given: What `--cluster` was given.

        Raises:
            UserError: Others use the cluster for longer than `cluster.wait`, or something cannot be served.
            LostError: An actor does not start.
        """
        self._reserve()
        here = self._ray.get_runtime_context().get_node_id()
        self._mailbox = self._mailbox_at(here)
        count, hangs = self._layout.ranks, self._config.cluster.hangs
        self._ranks = [self._actor(Rank, f"rank-{number}", number) for number in range(count)]
        self._services, lasting = services(self._config), {"max_restarts": -1, "max_task_retries": -1}
        self._servers = [
            self._actor(own.actor, own.name, count + number, self._mailbox, hangs, **lasting)
            for number, own in enumerate(self._services)
        ]
        found = self._got([actor.where.remote() for actor in self._ranks])
        # The first rank owns the folder, so it is the least likely to lose the driver.
        nodes = sorted(dict.fromkeys(where.node for where in found), key=lambda node: node != here)
        order = sorted(range(count), key=lambda number: (nodes.index(found[number].node), found[number].gpus, number))
        self._ranks, self._where = [self._ranks[number] for number in order], [found[number] for number in order]
        known = self._known(given)
        for rank, actor in enumerate(self._ranks):  # they import what they need while the teacher is loaded
            actor.prepare.remote(known | self._own(rank))
        served, common = self._serve(), self._common()
        for rank, actor in enumerate(self._ranks):
            environment = known | common | self._own(rank) | variables(served, rank, self._config, self._key)
            began = actor.run.remote(job, self._folder, environment, self._mailbox, f"rank-{rank}", hangs)
            self._running[began] = rank

    def events(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What the first rank has said since the last call.

        Raises:
            LostError: The actor that keeps it is gone.
        """
        return self._asked_mailbox(self._mailbox.collect)

    def finished(self, seconds: float) -> bool:
        """Whether all ranks have ended in order, and the driver has heard all; it waits for a while.

        Raises:
            RetortError: What a rank ended with.
            LostError: A rank is gone.
        """
        self._look()
        ended, _ = self._ray.wait(list(self._running), timeout=seconds) if self._running else ([], [])
        failed, lost = self._outcomes(ended)
        if failed or lost:
            # Those who miss one that was killed may be heard first.
            ends = time.monotonic() + _AFTER
            while self._running and not lost and time.monotonic() < ends:
                ended, _ = self._ray.wait(list(self._running), timeout=seconds)
                more, lost = self._outcomes(ended)
                failed += more
            if lost:
                raise LostError("; ".join(lost))
            raise self._error(failed)
        return not self._running and not ended

    @property
    def asked_to_stop(self) -> bool:
        """Whether the user has sent a signal."""
        return self._signalled > 0

    def signal(self, number: int) -> bool:
        """Passes a signal to the first rank; False from the third on."""
        self._signalled += 1
        if not self._running or self._signalled > 2:
            return False
        self._mailbox.signal.remote(number)
        return True

    def close(self) -> None:
        """Ends all actors, and gives their resources back."""
        actors = [*self._ranks, *self._servers, *([self._mailbox] if self._mailbox is not None else [])]
        for actor in actors:
            self._ray.kill(actor)
        if self._running:  # a rank that still lives holds the run's folder
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_AFTER)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)

    def _reserve(self) -> None:
        self._group = self._ray.util.placement_group(self._layout.bundles, strategy="PACK")
        if self._group.wait(_LOOK * 5):
            return
        wait = self._config.cluster.wait
        self._note(f"the cluster has no room now: waiting up to {wait:g} seconds for CPUs and GPUs (cluster.wait)")
        ends, alive = time.monotonic() + wait, self._alive()
        while not self._group.wait(min(_LOOK * 2, max(0.0, ends - time.monotonic()))):
            if self._config.cluster.ranks is None and alive - self._alive():
                raise LostError("a machine of the cluster is gone")
            if time.monotonic() < ends:
                continue
            free = self._ray.available_resources()
            has = ", ".join(f"{free.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
            raise UserError(
                f"the cluster did not have room for the run within {wait:g} seconds (free now: {has}); end what else "
                "runs there, raise cluster.wait, or lower the number of ranks, servers or workers"
            )

    def _alive(self) -> set[str]:
        """Machines of the cluster, by what Ray calls them."""
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}

    def _mailbox_at(self, node: str) -> Any:
        """A mailbox on the driver's node: no other machine takes it with it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
        return self._ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=strategy).remote()

    def _actor(self, kind: type, name: str, bundle: int, *arguments: Any, **options: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # pyright: ignore[reportMissingImports]

        needs = self._layout.bundles[bundle]
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=bundle)
        # Ranks of one machine see all its GPUs, as under torchrun; see `_own`.
        made = self._ray.remote(kind).options(
            num_cpus=needs.get("CPU", 0),
            num_gpus=needs.get("GPU", 0),
            scheduling_strategy=strategy,
            **options,
        )
        return made.remote(name, self._folder, *arguments)

    def _known(self, given: str) -> dict[str, str]:
        """Variables of all ranks that are known before they are brought together."""
        keys = {self._config.server.key, self._config.judge.key}
        passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED) or name in keys}
        threads = {"OMP_NUM_THREADS": str(self._config.cluster.rank_cpus)}
        return {**threads, **passed, CLUSTER: given}

    def _common(self) -> dict[str, str]:
        """Variables of all ranks by which they find one another."""
        (port,) = self._got([self._ranks[0].free_port.remote()])
        return {
            "WORLD_SIZE": str(len(self._ranks)),
            "MASTER_ADDR": _LOCAL if self._alone else self._where[0].host,
            "MASTER_PORT": str(port),
        }

    def _own(self, rank: int) -> dict[str, str]:
        """Variables of one rank."""
        node = self._where[rank].node
        fellows = [other for other, where in enumerate(self._where) if where.node == node]
        gpus = [gpu for other in fellows for gpu in self._where[other].gpus]
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        local = {"LOCAL_RANK": str(fellows.index(rank)), "LOCAL_WORLD_SIZE": str(len(fellows))}
        return {"RANK": str(rank), **local, **seen}

    @property
    def _alone(self) -> bool:
        """Whether all ranks are on one machine, though perhaps on several nodes of Ray."""
        return len({where.host for where in self._where}) == 1

    def _serve(self) -> list[tuple[Service, str]]:
        """What servers serve, and their addresses; each has begun to answer."""
        if not self._servers:
            return []
        places = self._got([actor.where.remote() for actor in self._servers])
        own, self._nodes = [where.host for where in places], [where.node for where in places]
        near = self._alone and set(own) == {self._where[0].host}
        self._at = [(_LOCAL if near else host, 0) for host in own]
        found = self._got([self._asked(number) for number in range(len(own))])
        for own, one in zip(self._services, found, strict=True):
            if one.problem is not None:
                raise UserError(f"{own.words} does not start: {one.problem}")
        self._at = [(host, one.port) for (host, _), one in zip(self._at, found, strict=True)]
        urls = [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in self._at]
        return list(zip(self._services, urls, strict=True))

    def _asked(self, number: int) -> Any:
        return self._services[number].serve(self._servers[number], *self._at[number], self._key)

    def _look(self) -> None:
        """Looks for actors that hang and for machines that are gone, and has servers that started again serve again.

        Raises:
            LostError: A rank hangs, or the machine of a server is gone.
            RunError: A server does not start again.
        """
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        self._end_hanging()
        gone = set(self._nodes) - self._alive() if self._nodes else set[str]()
        if gone:
            number = next(number for number, node in enumerate(self._nodes) if node in gone)
            raise LostError(f"the machine of {self._services[number].words} is gone ({self._at[number][0]})")
        idle = set(range(len(self._servers))) - set(self._serving.values())
        self._serving |= {self._asked(number): number for number in idle}
        ended, _ = (
            self._ray.wait(list(self._serving), num_returns=len(self._serving), timeout=0)
            if self._serving
            else ([], [])
        )
        for reference in ended:
            number = self._serving.pop(reference)
            (one,) = self._got([reference])
            if one.problem is not None:
                raise RunError(f"{self._services[number].words} ended and does not start again: {one.problem}")
            if one.began:
                self._note(f"{self._services[number].words} had ended, and was started again")

    def _asked_mailbox(self, method: Any) -> Any:
        """What the mailbox answers to a call without arguments.

        Raises:
            LostError: It is gone. A machine may have taken ranks with it: then the line begins with them.
        """
        try:
            (found,) = self._got([method.remote()], self._config.cluster.hangs)
        except LostError as error:
            ended, _ = self._ray.wait(list(self._running), timeout=_AFTER) if self._running else ([], [])
            _, lost = self._outcomes(ended)
            known = "; ".join([*lost, "the actor that hears the ranks is gone, too"]) if lost else str(error)
            raise LostError(known) from None
        return found

    def _end_hanging(self) -> None:
        """Ends actors that gave no sign of life for `cluster.hangs` seconds.

        Raises:
            LostError: It was a rank, or the actor that takes the signs.
        """
        hangs = self._config.cluster.hangs
        silent = self._asked_mailbox(self._mailbox.silent)
        for own, actor in zip(self._services, self._servers, strict=True):
            if silent.get(own.name, 0) > hangs:
                self._note(f"{own.words} gave no sign of life for {hangs:g} seconds: it is ended")
                self._mailbox.forget.remote(own.name)
                self._ray.kill(actor, no_restart=False)
        hanging = [rank for rank in self._running.values() if silent.get(f"rank-{rank}", 0) > hangs]
        if hanging:
            rank, count = hanging[0], len(self._ranks)
            raise LostError(
                f"rank {rank} of {count} gave no sign of life for {hangs:g} seconds (cluster.hangs): it hangs, or the "
                f"link to its machine is cut ({self._seen(rank)})"
            )

    def _seen(self, rank: int) -> str:
        return f"{self._where[rank].host}; its log: {self._where[rank].log}"

    def _outcomes(self, ended: Sequence[Any]) -> tuple[list[Outcome], list[str]]:
        """Of ranks that have ended: those that failed, and sentences about those that are gone."""
        failed, lost = list[Outcome](), list[str]()
        for reference in ended:
            rank = self._running.pop(reference)
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                lost.append(f"rank {rank} of {len(self._ranks)} was killed or its machine is gone ({self._seen(rank)})")
                continue
            if outcome.code:
                failed.append(outcome)
        return failed, lost

    def _error(self, failed: Sequence[Outcome]) -> RetortError:
        """The error that ends the run, of the rank that may say so."""
        told = next((one for one in failed if one.message), failed[0])
        message = told.message or f"a rank ended with exit code {told.code}; the logs: {self._where[0].log} and others"
        if told.trace:
            message += f"; where: {self._where[0].log} and the logs of the other ranks"
        return (UserError if told.code == UserError.exit_code else RunError)(message)

    def _got(self, references: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Results of actors.

        Args:
            references: The calls.
            seconds: For which they are waited for; None: without a limit.

        Raises:
            LostError: One of these is gone, does not start, or does not answer in time.
            UserError: A machine lacks what an actor imports.
        """
        try:
            return self._ray.get(list(references), timeout=seconds)
        except self._ray.exceptions.RayError as error:
            said = " ".join(str(error).split())
            lacking = next((part for part in ("ModuleNotFoundError", "ImportError") if part in said), None)
            if lacking is not None:
                why = shortened(said[said.rindex(lacking) :], 200)
                raise UserError(
                    f"an actor does not start: {why}; every machine of the cluster needs the same Retort and packages"
                ) from None
            raise LostError(f"an actor is gone, or does not start: {shortened(said, 300)}") from None


def _key(config: Config) -> str:
    """The key of the servers: the user's, who may have others under the same variable, or a new one."""
    return os.environ.get(config.server.key, "").strip() or secrets.token_urlsafe(24)
