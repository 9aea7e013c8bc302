"""One cluster of two nodes and one run of torchrun for all tests of `make cluster`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clustered import TOML, Nodes, command, ended, quick_start


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="rt")  # short: a path of a socket has at most 107 bytes
    with open(Path(folder) / "nodes.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "nodes.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=quick_start(folder),
            text=True,
        )
        assert process.stdout is not None
        found = Nodes(process.stdout.readline().strip(), folder, process)
        try:
            assert found.address, (Path(folder) / "nodes.log").read_text()
            yield found
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.communicate()
            for name in ("ray", "gcs", "python"):
                for pid in found.pids(name):
                    os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="session")
def torchrun(config: Path) -> Path:
    """The run on two ranks that torchrun starts, which nobody disturbs."""
    out = config.parent / "torchrun"
    two = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    ended(command(*two, "-m", "retort", "train", str(config), "--out", str(out)))
    return out
