"""Which part of a batch a rank answers for, and how the parts come together; ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retort import config as configuration
from retort.cli import main
from retort.core.rollouts import Group, Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import RetortError, UserError
from retort.ranks import WHOLE_BATCH, Share, World, join, world
from retort.ranks.share import balanced
from retort.train import runner
from retort.train.given.given import going_on
from retort.train.models.models import device_for
from retort.train.storage.folder import Claim, refuse_unshared


class Thread(World):
    """A rank that is a thread."""

    def __init__(self, rank: int, board: list[Any], gate: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.gate = rank, len(board), board, gate

    def each(self, work: Callable[[], Any]) -> list[Any]:
        self.board[self.rank] = work()
        self.gate.wait(timeout=60)
        found = list(self.board)
        self.gate.wait(timeout=60)
        return found


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What each of some ranks found."""
    board, found, gate = [None] * size, [None] * size, threading.Barrier(size)

    def run(rank: int) -> None:
        try:
            found[rank] = work(Thread(rank, board, gate))
        finally:
            if found[rank] is None:
                gate.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is not None for one in found)
    return found


def batch(*sizes: int) -> list[Group]:
    """Groups of so many rollouts, of lengths that differ."""
    found: list[Group] = []
    for place, size in enumerate(sizes):
        prompt, before = Prompt(f"p{place}", (Message("user", "x"),)), TokenSequence.of([0])
        written = [range(1, 3 * member + place + 2) for member in range(size)]
        found.append(
            tuple(Rollout(prompt, before.then(list(ids), decided=True), member=m) for m, ids in enumerate(written))
        )
    return found


@pytest.mark.parametrize(
    ("weights", "parts", "bounds"),
    [
        ([1] * 8, 2, [0, 4, 8]),
        ([9, 1, 1, 1], 2, [0, 1, 4]),  # by weight, and not by number
        ([1, 1, 1, 9], 3, [0, 2, 3, 4]),  # none is empty
        ([5, 5], 3, [0, 0, 1, 2]),  # there are not enough
        ([0, 0, 0], 3, [0, 1, 2, 3]),
    ],
)
def test_parts_weigh_about_the_same(weights: list[int], parts: int, bounds: list[int]) -> None:
    assert balanced(weights, parts) == bounds


@pytest.mark.parametrize("sizes", [(2, 1, 3, 2, 1), (2, 2), (1,)])
def test_shares_cover_the_batch_once(sizes: tuple[int, ...]) -> None:
    """Also where there are fewer groups than ranks: a rank without any asks about one, and answers for none."""
    groups = batch(*sizes)
    pack = Pack.of([rollout for group in groups for rollout in group])
    shares = together(3, lambda ranks: Share.of(groups, ranks))
    assert [index for share in shares for index in share.rollouts] == list(range(len(pack.rollouts)))
    assert torch.cat([torch.arange(len(pack))[share.steps] for share in shares]).tolist() == list(range(len(pack)))
    for share in shares:
        asked = groups[share.groups]
        assert asked
        own_N = pack.steps_of(share.own(range(len(pack.rollouts))))
        local = Pack.of([rollout for group in asked for rollout in group]).steps.tokens_N
        assert torch.equal(local[share.local(own_N)], pack.steps.tokens_N[own_N])


@pytest.mark.parametrize("sizes", [(2, 1, 3, 2, 1), (2,)])
def test_columns_come_together(sizes: tuple[int, ...]) -> None:
    groups = batch(*sizes)
    pack = Pack.of([rollout for group in groups for rollout in group])
    wanted_N = torch.arange(len(pack)).float()
    invalid_N = pack.steps.rollout_N != 0

    def work(ranks: World) -> tuple[Any, ...]:
        share = Share.of(groups, ranks)
        own_N = pack.steps_of(share.own(range(len(pack.rollouts))))
        found = {"x": torch.full((len(pack),), torch.nan).index_copy_(0, own_N, wanted_N[own_N])} if len(own_N) else {}
        local = slice(share.first, share.first + sum(r.steps for group in groups[share.groups] for r in group))
        valid_N = invalid_N[local]
        said = {"cut": None if bool(valid_N.all()) else valid_N, "always": None}
        counts = [{"no_context": float(len(groups[share.groups]))}]
        return share.columns(found, len(pack))["x"], share.valid(said), share.counts(counts)

    for column_N, valid, counts in together(3, work):
        assert torch.equal(column_N, wanted_N)
        assert torch.equal(valid["cut"], invalid_N) and valid["always"] is None
        assert counts == [{"no_context": float(len(groups))}]


def test_a_visit_drawn_twice_has_the_same_siblings_on_every_rank() -> None:
    """A replay draws visits with replacement; the copies may be on two ranks, where a teacher sees one of them each."""
    twice, other = batch(3, 2)
    groups = [twice, other, twice, other]

    def siblings(own: list[Group]) -> list[list[int]]:
        pack = Pack.of([rollout for group in own for rollout in group])
        assert all(rollout in group for rollout, group in zip(pack.rollouts, pack.groups(), strict=True))
        return [[rollout.member for rollout in group] for group in pack.groups()]

    shares = together(3, lambda ranks: Share.of(groups, ranks))
    assert [group for share in shares for group in siblings(groups[share.groups])] == siblings(groups)


def test_neighbours_with_the_same_key_stay_together() -> None:
    items = [(0, "a"), (0, "b"), (1, "c"), (2, "d"), (2, "e"), (3, "f"), (4, "g")]
    parts = [Thread(rank, [None] * 3, threading.Barrier(1)).part(items, lambda item: item[0]) for rank in range(3)]
    assert [list(part) for part in parts] == [items[:2], items[2:5], items[5:]]


def test_one_process_is_the_identity() -> None:
    groups, found = batch(2, 1), {"x": torch.zeros(3)}
    assert Share.of(groups, world.ONE) is WHOLE_BATCH
    assert WHOLE_BATCH.columns(found, 3) is found
    assert world.ONE.part([1, 2], id) == [1, 2]
    assert join() is world.ONE


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "4"}, "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not"),
        ({**dict.fromkeys(world._VARIABLES, "1"), "LOCAL_WORLD_SIZE": ""}, None),
        ({**dict.fromkeys(world._VARIABLES, "2"), "LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is not"),
        ({**dict.fromkeys(world._VARIABLES, "1"), "WORLD_SIZE": "many"}, "no number"),
    ],
)
def test_an_environment_left_over(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str | None
) -> None:
    for name in world._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert join() is world.ONE
        return
    with pytest.raises(UserError, match=said):
        join()


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),  # one process after all
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),  # which is refused: nobody else may be there
        (dict.fromkeys(world._VARIABLES, "2"), False),  # rank 0 says it
        ({**dict.fromkeys(world._VARIABLES, "2"), "RANK": "0"}, True),
    ],
)
def test_an_error_is_never_swallowed(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], speaks: bool
) -> None:
    for name in world._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world.may_speak() is speaks


def test_versions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(World):
        size = 2

        def each(self, work: Callable[[], Any]) -> list[Any]:
            return [work(), work() | {"torch": "1.0"}]

    with pytest.raises(UserError, match="rank 1 runs 1.0; install the same versions"):
        world._same_versions(Two())


def test_a_folder_that_ranks_do_not_share(tmp_path: Path) -> None:
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    for folder in folders:
        folder.mkdir(exist_ok=True)

    def work(ranks: World) -> str:
        try:
            refuse_unshared(folders[ranks.rank], ranks)
        except UserError as error:
            return str(error)
        return "nothing was said"

    for rank, said in enumerate(together(3, work)):
        assert said.startswith(f"out = {folders[rank]}: rank 2 does not see what rank 0 writes there; choose a folder")
        assert "\n" not in said
    folders[2] = folders[0]
    assert together(3, work) == ["nothing was said"] * 3
    assert not list(folders[0].iterdir()), "the trial leaves nothing behind"


@pytest.mark.parametrize(("device", "devices", "refused"), [("cuda", 1, True), ("auto", 2, False), ("cpu", 1, False)])
def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch, device: str, devices: int, refused: bool) -> None:
    monkeypatch.setattr(world, "_here", [Thread(1, [None] * 2, threading.Barrier(1))])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    config = configuration.resolve({"device": device})
    if not refused:
        assert device_for(config) == {"auto": "cuda"}.get(device, device)
        return
    with pytest.raises(
        UserError, match="rank 1 is number 1 on its machine, and torch sees 1 CUDA .*--nproc-per-node 1"
    ):
        device_for(config)


@pytest.mark.parametrize("words", [["methods"], ["eval", "countdown:student"]])
def test_other_commands_are_not_run_once_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    for name in world._VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert capsys.readouterr() == (
        "",
        f"retort: torchrun is for `retort train`; start `retort {words[0]}` by itself, in one process\n",
    )
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 2
    assert capsys.readouterr() == ("", "")  # rank 0 has said it


@pytest.mark.parametrize(("local", "command"), [("2", "torchrun"), ("1", "torchrun ...")])
def test_ranks_are_told_how_ranks_go_on(monkeypatch: pytest.MonkeyPatch, local: str, command: str) -> None:
    monkeypatch.setattr(world, "_here", [Thread(1, [None] * 2, threading.Barrier(1))])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    found = going_on(configuration.resolve({}), Path("runs/a"))
    assert found == f"{command} --nproc-per-node {local} -m retort train --resume runs/a"


def test_a_lost_rank_is_one_line() -> None:
    ranks = world._Ranks(0, 2, None)
    with pytest.raises(RetortError, match="lost another rank.*; go on there"), ranks.watched("go on there"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="a bug"), ranks.watched("go on there"):
        raise RuntimeError("a bug")


def test_one_rank_looks_at_the_folder_of_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries the lock there, so two ranks at once would take each other for another run."""

    class Second(World):
        rank, size = 1, 2

        def each(self, work: Callable[[], Any]) -> list[Any]:
            work()
            raise UserError("rank 0 refuses")

    monkeypatch.setattr(world, "_here", [Second()])
    with Claim(tmp_path).take()._lock, pytest.raises(UserError, match="rank 0 refuses"):
        runner.start(configuration.resolve({}), tmp_path)


def test_ranks_go_on_from_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a network's folder shows one machine fewer checkpoints: then the run is refused."""
    newest = tmp_path / "checkpoints" / "step-3"

    class Second(World):
        rank, size = 1, 2

        def each(self, work: Callable[[], Any]) -> list[Any]:
            own = work()
            return [(tmp_path, newest) if own is None else own, own]

    newest.with_name("step-2").mkdir(parents=True)
    configuration.save(configuration.resolve({"data": "countdown"}), tmp_path / "config.json")
    monkeypatch.setattr(world, "_here", [Second()])
    with pytest.raises(UserError, match="step-3/manifest.json is missing"):
        runner.load(tmp_path)
