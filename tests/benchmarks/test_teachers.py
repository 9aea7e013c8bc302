"""The benchmark of teachers on servers: bytes are counted, and what is compared is the same work."""

from __future__ import annotations

import importlib
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import in_thread

from retort.models.load import load_model

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "teachers", raising=False)  # a folder of tests has the same name
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("servers", "scored_work", "teachers")})


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    folder = model_folder(seed=3, hidden_size=24)
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def url(lm: Any) -> Iterator[str]:
    with in_thread(lm) as found:
        yield found


def test_a_relay_counts_every_byte(bench: SimpleNamespace, url: str) -> None:
    relay = bench.servers.Relay(url)
    with urllib.request.urlopen(f"{relay.url}/v1/retort") as answer:
        body, head = answer.read(), str(answer.headers).replace("\n", "\r\n")
    assert body == urllib.request.urlopen(f"{url}/v1/retort").read()
    assert relay.received == len(b"HTTP/1.1 200 OK\r\n") + len(head) + len(body)
    assert relay.sent > len("GET /v1/retort HTTP/1.1\r\n")
    relay.reset()
    assert (relay.sent, relay.received) == (0, 0)
    relay.close()


def test_every_kind_is_the_local_one_and_takes_the_bytes_that_it_must(
    bench: SimpleNamespace, lm: Any, url: str
) -> None:
    work, relay = bench.scored_work.random_work(40, 2, 2, 16), bench.servers.Relay(url)
    teacher, counted = (bench.scored_work.served(address, 40) for address in (url, relay.url))
    far = bench.teachers.Far("retort serve", teacher, counted, relay, lambda: 0.0)
    counted.lm.head()  # it is sent once
    near = bench.scored_work.local(lm, 40)
    width, k = lm.head().weight_VD.shape[1], bench.scored_work.K
    least = (4, 4 + 12 * k + 4, 4 + 4 * k, 4 * width, 4 * width)  # a row of numbers: ids are int64, all else fp32
    for kind, bytes_ in zip(bench.scored_work.KINDS, least, strict=True):
        (row,) = bench.teachers.compared(kind, work, near, [far], 1)
        cells = dict(zip(bench.teachers.WIRE, row, strict=True))
        envelope = 1000 / work.steps  # names, shapes, and the words of HTTP
        assert bytes_ < int(cells["bytes received"]) < bytes_ + 8 + envelope, kind
        assert cells["largest difference"] == "0", kind
        assert cells["CPU ms, client"] > 0
    relay.close()


def test_noise_is_that_of_the_distributions(bench: SimpleNamespace, lm: Any, url: str) -> None:
    work = bench.scored_work.random_work(40, 1, 2, 8)
    near, far = bench.scored_work.local(lm, 40), bench.scored_work.served(url, 40)
    assert bench.teachers.differences(near, far, work) == ["0"] * 4
    narrow = bench.scored_work.served(url, 40, narrow=True)
    rounded = [float(value) for value in bench.teachers.differences(near, narrow, work)]
    assert all(0 < value < 0.1 for value in rounded)
    mean, largest, kl, _ = rounded
    assert mean < largest
    assert kl < mean


@pytest.mark.slow
def test_clients_of_one_server_are_processes_that_score(
    bench: SimpleNamespace, model_folder: Callable[..., Path]
) -> None:
    folder = str(model_folder(seed=3, hidden_size=24))
    with bench.servers.ours(folder, "precision=fp32", "device=cpu") as server:
        before = server.cpu()
        with bench.teachers.Clients(server.url, 2) as clients:
            assert [len(clients.score(kind, 2)) for kind in bench.teachers.SHARED] == [2, 2]
        assert server.cpu() > before
