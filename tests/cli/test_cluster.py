"""What `retort train --cluster` refuses before it speaks to Ray."""

from __future__ import annotations

import importlib.util
import json
import socket
from typing import Any

import pytest

from retort.cli import main
from retort.cluster.connect import connected
from retort.cluster.driver import Plan
from retort.cluster.job import Job
from retort.cluster.resources import Machine, layout
from retort.cluster.service import services, variables
from retort.config import resolve
from retort.errors import UserError


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that are not installed; a test adds to them."""
    lacking, found = set[str](), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in lacking else object() if name == "ray" else found(name, *more),
    )
    return lacking


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    return told


def test_ray_is_not_installed(capsys: pytest.CaptureFixture[str], packages: set[str]) -> None:
    packages.add("ray")
    assert "pip install 'retort-distill[ray]'" in refused(capsys, "--cluster", "auto")


def test_no_address(capsys: pytest.CaptureFixture[str], packages: set[str]) -> None:
    assert "give auto, or the address" in refused(capsys, "--cluster", "nowhere")


def test_under_torchrun(
    capsys: pytest.CaptureFixture[str], packages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "torchrun" in refused(capsys, "--cluster", "auto")


def test_a_cluster_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster at {address}"), connected(address, dashboard=False):
            pass


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"teacher": None, "method": {"name": "opsd"}}, "this run has none"),
        ({"teacher": "http://127.0.0.1:1"}, "is a server already"),
        ({"teacher": "b", "ranks": {"teacher": "sharded"}}, "has the ranks hold it"),
    ],
    ids=["none", "server", "sharded"],
)
def test_servers_of_a_teacher_that_there_is_not(settings: dict[str, Any], problem: str) -> None:
    given = {"student": "a", "data": "c.jsonl", "out": "d", "cluster": {"teachers": 2}, **settings}
    with pytest.raises(UserError, match=problem):
        Plan.of(Job([given]), None, {})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "this run has none"),
        ({"rollout": {"env": "http://127.0.0.1:1"}}, "http://127.0.0.1:1 is a server already"),
    ],
    ids=["none", "server"],
)
def test_servers_of_an_environment_that_there_is_not(settings: dict[str, Any], problem: str) -> None:
    given = {"student": "a", "teacher": "b", "data": "c.jsonl", "out": "d", "cluster": {"environments": 2}, **settings}
    with pytest.raises(UserError, match=f"cluster.environments = 2 .*, and {problem}; set it to 0"):
        Plan.of(Job([given]), None, {})


def test_ranks_share_servers_of_the_environment_and_each_has_one_of_the_teacher() -> None:
    asked = {"teachers": 2, "environments": 2, "environment_cpus": 3}
    config = resolve({"student": "a", "teacher": "/b", "data": "rooms", "cluster": asked})
    found = services(config)
    assert [own.role for own in found] == ["teacher"] * 2 + ["environment"] * 2
    assert [own.name for own in found] == ["teacher-0", "teacher-1", "environment-0", "environment-1"]
    assert found[-1].words == "server 1 of the environment"
    served = list(zip(found, ["http://t:1", "http://t:2", "http://e:3", "http://e:4"], strict=True))
    for rank, teacher in enumerate(("http://t:1", "http://t:2", "http://t:1")):
        own = variables(served, rank, config, "sesame")
        assert own.pop("RETORT_TEACHER_KEY") == "sesame"
        assert {name: json.loads(text) for name, text in own.items()} == {
            "RETORT_SERVED": {"/b": teacher, "env:rooms": "http://e:3,http://e:4"}
        }
    room = layout(config, [Machine("x", 9, 0)])
    assert room.bundles == [room.rank] + [room.teacher] * 2 + [{"CPU": 3}] * 2
    with pytest.raises(UserError, match=r"1 rank of 1 and 2 teachers of 1 and 2 environments of 3"):
        layout(config, [Machine("x", 8, 0)])


def test_vllm_has_a_place_of_its_own_and_is_a_worker() -> None:
    """Also where no workers are asked for: what a rank starts by itself, nobody would have counted."""
    asked = {"student": "a", "teacher": "b", "data": "c"}
    by_vllm = {"engine": "vllm", "vllm_python": "/v/python", "vllm_options": ["--seed=1"]}
    for workers, count in ((0, 1), (2, 2)):
        config = resolve({**asked, "rollout": {**by_vllm, "workers": workers}, "cluster": {"worker_cpus": 3}})
        assert config.rollout.vllm == ("/v/python", "--seed=1")
        found = services(config)
        assert [own.name for own in found] == [f"worker-{number}" for number in range(count)]
        served = [(own, f"http://w:{own.number}") for own in found]
        said = variables(served, 0, config, "sesame")
        assert json.loads(said["RETORT_WORKERS"]) == [address for _, address in served]
        room = layout(config, [Machine("x", 16, 0)])
        assert room.bundles == [{"CPU": 1}] + [{"CPU": 3}] * count
        gpus = layout(config, [Machine("x", 16, 4)])
        assert (gpus.ranks, gpus.bundles[-1]) == (4 - count, {"CPU": 3, "GPU": 1})
    assert services(resolve(asked)) == []


def test_defaults_fit_the_machines() -> None:
    config = resolve({"student": "a", "teacher": "b", "data": "c"})
    plain = layout(config, [Machine("x", 4, 0), Machine("y", 4, 0)])
    assert (plain.ranks, plain.rank, plain.teachers) == (2, {"CPU": 1}, 0)
    gpus = layout(
        config.model_copy(update={"cluster": resolve({"cluster": {"teachers": 2}}).cluster}), [Machine("x", 16, 8)]
    )
    assert (gpus.ranks, gpus.rank, gpus.teacher) == (6, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    assert gpus.bundles == [gpus.rank] * 6 + [gpus.teacher] * 2


@pytest.mark.parametrize(
    ("settings", "machines", "problem"),
    [
        ({"cluster": {"ranks": 3}}, [Machine("x", 2, 0)], "needs 3 CPUs"),
        ({"cluster": {"ranks": 3, "rank_cpus": 2}}, [Machine("x", 3, 0), Machine("y", 3, 0)], "has 6 on 2 machines"),
        ({"cluster": {"rank_cpus": 8}}, [Machine("x", 2, 0)], "largest machine"),
        ({"device": "cuda"}, [Machine("x", 2, 0)], "no GPU"),
        ({"cluster": {"ranks": 3}}, [Machine("x", 8, 2)], "needs 3 GPUs"),
        ({"rollout": {"engine": "vllm"}}, [Machine("x", 1, 0)], r"2 CPUs \(1 rank of 1 and 1 worker of 1\)"),
        (
            {"rollout": {"workers": 1}, "cluster": {"worker_gpus": 2}},
            [Machine("x", 8, 4)],
            "is for rollout.engine=vllm",
        ),
    ],
    ids=["few", "halves", "large", "cuda", "gpus", "vllm", "gpus of a worker"],
)
def test_a_cluster_with_too_little(settings: dict[str, Any], machines: list[Machine], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        layout(resolve({"student": "a", "teacher": "b", "data": "c", **settings}), machines)
