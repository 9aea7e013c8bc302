"""The store of the cache: whatever happens to it, what it gives back is what was put into it."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import cache_writers
import forked
import pytest
import torch
from torch import Tensor

from retort.cache import store as stores
from retort.cache.index import FILE
from retort.cache.shards import save_shard
from retort.cache.store import SHARDS, Store
from retort.errors import UserError

LARGE = 10**9
Entries = Mapping[str, Mapping[str, Tensor]]


def entries(*keys: str, size: int = 4) -> dict[str, dict[str, Tensor]]:
    """Entries of numbers that follow from the key."""
    return {key: {"logp": torch.arange(size).float() + len(key), "ids": torch.arange(size * 2)} for key in keys}


def same(found: Entries, expected: Entries) -> bool:
    return found.keys() == expected.keys() and all(
        own.keys() == expected[key].keys()
        and all(torch.equal(values, expected[key][name]) for name, values in own.items())
        for key, own in found.items()
    )


def shards(store: Store) -> list[Path]:
    return sorted((store.folder / SHARDS).glob("*.safetensors"))


def test_it_gives_back_what_was_put_in_to_the_last_bit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(5, 3, generator=draw)
    given: dict[str, dict[str, Tensor]] = {
        "a": {"states": states, "half": states.bfloat16(), "none": torch.zeros(0, 3)},
        "b": {"states": torch.tensor([float("-inf"), -0.0])},
    }
    Store(tmp_path, LARGE).put("m", given)
    found = Store(tmp_path, LARGE).get(["b", "c", "a", "a"])
    assert same(found, given)
    assert found["a"]["half"].dtype == torch.bfloat16
    assert torch.signbit(found["b"]["states"]).tolist() == [True, True]


def test_nothing_is_made_before_the_first_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", LARGE)
    store.put("m", {})
    assert not store.exists
    assert not (tmp_path / "cache").exists()


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    first = Store(tmp_path, LARGE)
    first.put("m", entries("a"))
    room = int(first.size * 2.5)
    store = Store(tmp_path, room)
    store.put("m", entries("bb"))
    assert store.get(["a"]).keys() == {"a"}
    store.put("m", entries("ccc"))
    assert store.size <= room
    assert store.get(["a", "bb", "ccc"]).keys() == {"a", "ccc"}, "a was read after bb was stored"
    assert len(shards(store)) == 2
    tiny = Store(tmp_path, 10)
    tiny.put("m", entries("dddd"))
    assert tiny.size == 0
    assert shards(tiny) == []


def test_a_damaged_entry_counts_as_not_stored_and_is_counted(tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a", "bb"))
    (path,) = shards(store)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = store.get(["a", "bb"])
    assert len(found) == 1
    assert same(found, entries(*found))
    assert store.take_faults() == (1, 0)
    assert store.get(["a", "bb"]).keys() == found.keys()
    assert store.take_faults() == (0, 0), "it is forgotten, and missed from then on"
    store.put("m", entries("a", "bb"))
    assert same(store.get(["a", "bb"]), entries("a", "bb"))


@pytest.mark.parametrize("content", [b"", b"\xff" * 200])
def test_a_shard_that_cannot_be_read_at_all_is_dropped(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a", "bb"))
    shards(store)[0].write_bytes(content)
    assert store.get(["a", "bb"]) == {}
    assert store.take_faults() == (2, 0)
    assert shards(store) == []
    assert store.size == 0


def test_a_shard_that_another_process_removed_is_a_miss_and_no_fault(tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a"))
    shards(store)[0].unlink()
    assert store.get(["a"]) == {}
    assert store.take_faults() == (0, 0)
    assert store.size == 0


def test_shards_without_an_index_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a"))
    for path in tmp_path.glob(f"{FILE}*"):
        path.unlink()
    save_shard(tmp_path / SHARDS, "m", entries("bb"))  # as a process that was killed before it told the index
    (tmp_path / SHARDS / "nonsense.safetensors").write_bytes(b"no shard")
    again = Store(tmp_path, LARGE)
    assert same(again.get(["a", "bb"]), entries("a", "bb"))
    assert again.size == sum(path.stat().st_size for path in shards(again))
    assert not (tmp_path / SHARDS / "nonsense.safetensors").exists()


def test_an_index_that_is_no_index_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, " * 100)
    with pytest.raises(UserError, match="is damaged .* it is made anew from the shards") as caught:
        Store(tmp_path, LARGE).get(["a"])
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: .*; set cache.dir to a folder"):
        Store(tmp_path / "file", LARGE).get(["a"])


def test_a_full_disk_is_counted_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "save_shard", full)
    store.put("m", entries("bb", "ccc"))
    assert store.take_faults() == (0, 2)
    assert same(store.get(["a", "bb"]), entries("a"))


def other(function: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A process that works on a cache, and the line to it."""
    line, its_line = forked.server().Pipe()
    process = forked.started(function, *arguments, its_line)
    its_line.close()
    return process, line


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    both = [other(cache_writers.write, tmp_path, letter, 25, 8) for letter in "xy"]
    for one, _ in both:
        one.join(120)
        assert one.exitcode == 0
    store = Store(tmp_path, LARGE)
    keys = {f"{letter}{number}.{place}" for letter in "xy" for number in range(25) for place in range(4)}
    found = store.get([*keys, *(f"both{number}" for number in range(25))])
    assert found.keys() == keys | {f"both{number}" for number in range(25)}
    assert all(bool((own["logp"] == float(key[1:].split(".")[0])).all()) for key, own in found.items() if key in keys)
    assert store.take_faults() == (0, 0)
    assert store.size == sum(path.stat().st_size for path in shards(store))


def test_two_processes_open_a_new_cache_at_once(tmp_path: Path) -> None:
    count = 40
    both = [other(cache_writers.open_new, tmp_path, count) for _ in range(2)]
    for number in range(count):
        assert [line.recv() for _, line in both] == [number, number]
        for _, line in both:
            line.send("now")
    for one, _ in both:
        one.join(120)
        assert one.exitcode == 0


@pytest.mark.parametrize("after", [1, 3])
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_half(after: int, tmp_path: Path) -> None:
    """Shards of megabytes, so that most of its time is spent on writing one."""
    one, line = other(cache_writers.write, tmp_path, "x", 10_000, 300_000)
    done = [line.recv() for _ in range(after)]
    one.kill()
    one.join(60)
    assert one.exitcode == -signal.SIGKILL
    store = Store(tmp_path, LARGE)
    keys = [f"x{number}.{place}" for number in range(after + 30) for place in range(4)]
    found = store.get(keys)
    assert {f"x{number}.{place}" for number in done for place in range(4)} <= found.keys()
    assert all(bool((own["logp"] == float(key[1:].split(".")[0])).all()) for key, own in found.items())
    assert store.take_faults() == (0, 0)
    assert [path.name for path in (tmp_path / SHARDS).iterdir() if path.suffix != ".safetensors"] == []
    store.put("m", entries("a"))
    assert store.get(["a"]).keys() == {"a"}


def test_what_a_living_process_has_not_finished_stays(tmp_path: Path) -> None:
    from retort.cache.shards import lock

    Store(tmp_path, LARGE).put("m", entries("a"))
    left, held = (tmp_path / SHARDS / f".unfinished-{name}" for name in ("left", "held"))
    for path in (left, held):
        path.write_bytes(b"half a shard")
    with held.open("rb") as file:
        assert lock(file.fileno())
        Store(tmp_path, LARGE).get(["a"])
        assert (left.exists(), held.exists()) == (False, True)


def test_an_index_from_elsewhere_reaches_nothing_outside_of_the_cache(tmp_path: Path) -> None:
    """Caches are handed on, and an index is text of somebody's."""
    outside = [tmp_path / "outside", tmp_path / "outside.safetensors"]
    outside[0].mkdir()
    outside[1].write_text("kept")
    store = Store(tmp_path / "cache", 10)
    store.put("m", entries("a"))
    with sqlite3.connect(tmp_path / "cache" / FILE) as database:
        database.execute("insert into shards values ('../../outside', 'm', 99, 0)")
        database.execute("insert into entries values ('b', '../../outside', 'x')")
        database.execute("insert into models values ('../../outside', 99)")
        database.execute("insert into names values ('large', '../../outside')")
    database.close()
    assert store.model("large") is None
    assert store.get(["b"]) == {}
    with sqlite3.connect(tmp_path / "cache" / FILE) as database:
        database.execute("insert into shards values ('../../outside', 'm', 99, 0)")
    database.close()
    store.put("m", entries("bb"))
    assert store.size == 0
    assert all(path.exists() for path in outside)


def test_a_row_without_its_shard_is_repaired(tmp_path: Path) -> None:
    store = Store(tmp_path, LARGE)
    store.put("m", entries("a", "bb"))
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("update entries set shard = 'gone' where key = 'a'")
    database.close()
    assert store.get(["a", "bb"]).keys() == {"bb"}
    assert store.get(["a"]) == {}
    store.put("m", entries("a"))
    assert same(store.get(["a", "bb"]), entries("a", "bb"))
