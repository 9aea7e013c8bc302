"""Signs of life, and the interface over which ranks speak; without Ray."""

from __future__ import annotations

import asyncio
import sys

import pytest

from retort.cluster.mailbox import Mailbox
from retort.cluster.rank import interface_of


def test_an_actor_is_silent_since_its_last_sign_of_life() -> None:
    async def talk() -> None:
        mailbox = Mailbox()
        assert await mailbox.silent() == {}
        await mailbox.beat("rank-0")
        await mailbox.beat("teacher-0")
        await asyncio.sleep(0.02)
        await mailbox.beat("rank-0")
        silent = await mailbox.silent()
        assert silent["teacher-0"] >= 0.02 and silent["rank-0"] < silent["teacher-0"]
        await mailbox.forget("teacher-0")
        await mailbox.forget("worker-0")
        assert (await mailbox.silent()).keys() == {"rank-0"}

    asyncio.run(talk())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="interfaces are asked for by calls of Linux")
def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == interface_of(None) == "lo"
    assert interface_of("192.0.2.1") is None  # an address of documentation
