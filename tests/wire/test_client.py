"""The client of servers, against a real process that misbehaves as it is told."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.errors import UnreachableError, UserError
from retort.wire import Client
from retort.wire.client import MissingPathError


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("misbehaving.py")), str(folder)])
        while not (folder / "port").exists():
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}"

    def fails(self, *faults: str) -> None:
        (self.folder / "faults").write_text(" ".join(faults))
        (self.folder / "asked").unlink(missing_ok=True)

    @property
    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("fault", ["refuse", "429", "500", "503", "cut", "page"])
def test_what_may_pass_is_tried_again(server: Server, fault: str) -> None:
    server.fails(fault, fault)
    client = Client(server.url, patience=30)
    assert client.post_json("/v1/x", {"a": 1})["path"] == "/v1/x"
    assert len(server.asked) == 3
    client.close()


def test_patience_ends_in_one_line_that_says_what_and_where(server: Server) -> None:
    server.fails(*["503"] * 50)
    client = Client(server.url, patience=0.5)
    with pytest.raises(UnreachableError) as found:
        client.get_json("/x")
    assert server.url in str(found.value)
    assert "503" in str(found.value)
    assert "\x1b" not in str(found.value), "what a server says is shown, not obeyed"
    assert "\n" not in str(found.value)
    assert len(server.asked) > 1


def test_patience_of_none_is_one_attempt(server: Server) -> None:
    server.fails("500")
    with pytest.raises(UnreachableError, match="at the first attempt"):
        Client(server.url, patience=0).get_json("/x")
    assert len(server.asked) == 1


def test_a_slow_drip_does_not_count_as_an_answer(server: Server) -> None:
    server.fails("drip")
    with pytest.raises(UnreachableError, match="within"):
        Client(server.url, patience=0, timeout=0.3).get_json("/x")


def test_a_longer_wait_than_the_patience_is_not_waited_for(server: Server) -> None:
    server.fails("429")
    with pytest.raises(UnreachableError, match="429"):
        Client(server.url, patience=0.05).get_json("/x")
    assert len(server.asked) == 1


def test_what_will_not_pass_is_asked_once(server: Server) -> None:
    client = Client(server.url, patience=30)
    for fault, kind, words in (
        ("400", UserError, "400"),
        ("401", UserError, "RETORT_TEACHER_KEY"),
        ("404", MissingPathError, "404"),
        ("302", UserError, "elsewhere"),
    ):
        server.fails(fault)
        with pytest.raises(kind, match=words):
            client.get_json("/x")
        assert len(server.asked) == 1


def test_nobody_at_home() -> None:
    with pytest.raises(UnreachableError, match=r"http://127.0.0.1:9: .*connected"):
        Client("http://127.0.0.1:9", patience=0).get_json("/x")


def test_the_key_comes_from_the_environment_and_is_in_no_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sesame-1234")
    client = Client(server.url, key_variable="OTHER_KEY", patience=0)
    server.fails("401")
    with pytest.raises(UserError, match="OTHER_KEY") as found:
        client.get_json("/x")
    assert server.asked == ["GET /x Bearer sesame-1234"]
    assert "sesame" not in f"{client!r} {found.value} {found.value.__cause__}"


def test_several_at_once_come_back_in_order(server: Server) -> None:
    server.fails("503", "", "cut")
    client = Client(server.url, concurrency=3, patience=30)
    told: dict[int, str] = {}
    found = client.each(lambda number: client.get_json(f"/{number}")["path"], range(9), told.__setitem__)
    assert [told[place] for place in range(9)] == found
    assert found == [f"/{number}" for number in range(9)]


def test_when_one_fails_for_good_the_others_are_not_tried_any_longer(server: Server) -> None:
    server.fails(*["503"] * 1000)
    client = Client(server.url, concurrency=2, patience=10_000)

    def work(number: int) -> object:
        if number:
            return client.get_json("/x")
        time.sleep(0.3)  # the other one is waiting for its next attempt by now
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        client.each(work, [0, 1])
    assert 0 < len(server.asked) < 20


@pytest.mark.parametrize(
    "url",
    ["http://name:word@host", "http://", "http://host:99999", "http://host?key=1", "http://ho st", "http://host#a"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="address"):
        Client(url)
