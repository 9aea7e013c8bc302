"""Two machines, which are two network namespaces, and the link between them that is cut while a run is made."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from clustered import ROLLOUTS, STEPS, Nodes, after_step, ended, ids, quick_start, rows, until

pytestmark = pytest.mark.cluster

#: Addresses of the first and of the second machine.
HOSTS = ("10.213.77.1", "10.213.77.2")
#: Ray finds a machine lost within half a minute.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000"}


@dataclass
class Linked:
    """Two machines with a node of Ray each, the first with the head."""

    nodes: Nodes
    spaces: tuple[str, str]

    def cut(self) -> None:
        """Cuts the link."""
        subprocess.run(["ip", "-n", self.spaces[0], "link", "set", "link0", "down"], check=True)

    def ranks(self, machine: int) -> list[int]:
        """Ranks on a machine."""
        own = Path(f"/var/run/netns/{self.spaces[machine]}").stat().st_ino
        return [pid for pid in self.nodes.pids("ray::Rank") if _space(pid) == own]


def _space(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0


def _made(spaces: tuple[str, str]) -> str | None:
    """Makes two network namespaces and a link between them; why that is not allowed here, if it is not."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    first, second = spaces
    words = [
        *[f"netns add {space}" for space in spaces],
        f"-n {first} link add link0 type veth peer name link0 netns {second}",
        *[f"-n {space} addr add {host}/24 dev link0" for space, host in zip(spaces, HOSTS, strict=True)],
        *[f"-n {space} link set {name} up" for space in spaces for name in ("lo", "link0")],
    ]
    for own in words:
        done = subprocess.run(["ip", *own.split()], capture_output=True, text=True)
        if done.returncode:
            return f"no network namespaces here: {done.stderr.strip()}"
    return None


def _node(space: str, folder: str, variables: Mapping[str, str], *words: str) -> None:
    surroundings = {**quick_start(folder), **HEALTH, **variables}
    del surroundings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # the nodes have addresses of their own
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=80000000"]
    with open(Path(folder) / "nodes.log", "ab") as log:
        within = ["ip", "netns", "exec", space]
        done = subprocess.run([*within, *start, *words], env=surroundings, stdout=log, stderr=log)
    assert not done.returncode, (Path(folder) / "nodes.log").read_text()


@pytest.fixture
def linked() -> Iterator[Linked]:
    spaces = (f"retort-{os.getpid()}-1", f"retort-{os.getpid()}-2")
    folder = tempfile.mkdtemp(prefix="rt")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    within = ("ip", "netns", "exec", spaces[0])
    found = Linked(Nodes(f"{HOSTS[0]}:6379", folder, within=within, variables=token), spaces)
    try:
        problem = _made(spaces)
        if problem is not None:
            pytest.skip(problem)
        head = ("--head", "--port=6379", "--include-dashboard=false")
        _node(spaces[0], folder, token, *head, f"--node-ip-address={HOSTS[0]}")
        _node(spaces[1], folder, token, f"--address={HOSTS[0]}:6379", f"--node-ip-address={HOSTS[1]}")
        yield found
    finally:
        for pid in found.nodes.pids(""):
            os.kill(pid, signal.SIGKILL)
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_link_that_is_cut(linked: Linked, config: Path, torchrun: Path) -> None:
    """The run goes on with the machine that is left, and a rank that is cut off ends itself."""
    out, own = config.parent / "cut", config.parent / "linked.toml"
    own.write_text(config.read_text().replace("cluster = { ranks = 2, rank_cpus = 2 }", "cluster = { hangs = 20 }"))
    process = linked.nodes.train(str(own), "--out", str(out))
    after_step(1, out, process)
    assert len(linked.ranks(0)) == len(linked.ranks(1)) == 1
    linked.cut()
    printed = " ".join(ended(process).split())
    assert "the run goes on from step-" in printed
    until(lambda: not linked.ranks(1))
    assert len(rows(out)) == STEPS and rows(out)[0] == rows(torchrun)[0]
    assert [row["loss"] for row in rows(out)] == pytest.approx([row["loss"] for row in rows(torchrun)], rel=1e-4)
    assert len(set(ids(out))) == STEPS * ROLLOUTS and ids(out) == ids(torchrun)
