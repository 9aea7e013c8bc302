"""A Ray cluster: which one is meant, and the connection to it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from retort.errors import UserError, shortened

#: Seconds for the head of a cluster to answer.
_ANSWERS = 10.0
#: Bytes of Ray's store of objects on this machine, in which a run keeps nothing: the least that Ray takes.
_STORE = 80 * 2**20
#: Lines of Ray's about itself that are no error of a run's.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}
#: Of a new cluster: it takes 127.0.0.1 for this machine's address and listens there alone. Its actors, which are all
#: that the user asked for, do not give way to other processes, as Ray would have them do.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}


def address_of(given: str) -> str | None:
    """The address that an option `--cluster` means; None: a new cluster of this machine alone.

    Args:
        given: `auto`, or HOST:PORT.

    Raises:
        UserError: Ray is not installed, this process is one of several already, or it is no address.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "--cluster has Ray start the ranks, and torchrun (or WORLD_SIZE in the environment) did so already: start "
            "`retort train --cluster ...` by itself, in one process"
        )
    if not hasattr(os, "fork"):
        raise UserError("--cluster needs a system with fork, such as Linux; leave it out here")
    lacking = [name for name in ("ray", "httpx2", "tenacity") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--cluster needs the package '{lacking[0]}': pip install 'retort-distill[ray]'")
    address = os.environ.get("RAY_ADDRESS", "").strip() or None if given == "auto" else given
    if address is not None and not re.fullmatch(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", address):
        raise UserError(
            f"--cluster {shortened(address, 100)}: give auto, or the address of a cluster's head as HOST:PORT, which "
            "`ray start --head` prints"
        )
    return address


@contextlib.contextmanager
def connected(address: str | None, *, dashboard: bool) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; what Ray itself prints is left out.

    Args:
        address: HOST:PORT, or None for a new cluster on loopback that ends with the block.
        dashboard: Whether a new cluster has Ray's dashboard, on loopback.

    Raises:
        UserError: There is no such cluster, or it runs another version of Ray or Python.
    """
    os.environ.update({**_QUIET, **(_LOOPBACK if address is None else {})})
    if address is not None:
        _there(address)
    elif dashboard and importlib.util.find_spec("aiohttp_cors") is None:
        raise UserError("cluster.dashboard needs more of Ray: pip install 'ray[default]', or leave it out")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        import ray  # pyright: ignore[reportMissingImports]

        local: dict[str, Any] = {
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": _STORE,
        }
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="CRITICAL",
                configure_logging=True,
                **(local if address is None else {}),
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            said = shortened(" ".join(str(error).split()), 300)
            raise UserError(f"{address or 'a new Ray cluster'}: {said}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _there(address: str) -> None:
    """Refuses an address at which nothing listens: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"no Ray cluster at {address} ({why}); start one there with `ray start --head --port {port}`, or have "
            "--cluster auto make one of this machine"
        ) from None
