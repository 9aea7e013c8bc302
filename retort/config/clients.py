"""What speaks to the servers of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Callable

from retort.config.sections import ServerSection
from retort.envs.elsewhere import CALLS
from retort.wire import Client


def client_of(asked: ServerSection, url: str, *, concurrency: int | None = None) -> Client:
    """What speaks to the server at an address.

    Args:
        asked: The settings.
        url: The address.
        concurrency: Requests under way at once; None: as the settings say.

    Raises:
        UserError: See `Client`.
    """
    return Client(
        url,
        key_variable=asked.key,
        timeout=asked.timeout,
        patience=asked.patience,
        concurrency=concurrency or asked.requests,
    )


def environment_client(asked: ServerSection) -> Callable[[str], Client]:
    """What makes the clients of servers of an environment, whose episodes may all wait at the same time."""
    return lambda url: client_of(asked, url, concurrency=CALLS)
