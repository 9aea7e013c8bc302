"""Checkpoints of one, two and three ranks are read by one, two and three ranks, bit by bit; processes over gloo."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import server
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

from retort.errors import RunError, UserError
from retort.models.sharding import full
from retort.ranks import ONE, here, world
from retort.train.storage import checkpoint, slices

STATE: dict[str, Any] = {
    **{
        "updates": 1,
        "begun": 0,
        "best": None,
        "data": "",
        "models": {},
        "remote": {},
        "start": None,
        "precision": "fp32",
    },
    **{"owes_probe": False, "advised": [], "run": {"settings": {}, "digests": {}, "versions": {}}},
}
#: The first dimension of one is divided by no number of ranks, of one is less than they are.
SHAPES = {"embedding": (7, 3), "norm": (5,), "head": (1, 4), "cube": (2, 3, 2)}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def moments() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index, weight in enumerate(weights().values()):
        steps = torch.tensor(3.0 + index)
        found |= {f"{index}.step": steps, f"{index}.exp_avg": weight * 0.1, f"{index}.exp_avg_sq": weight.square()}
    return found


def parts() -> dict[str, Tensor]:
    """What is whole on every rank: any dtype, no dimension, no element."""
    kinds: list[Any] = [torch.arange(9), torch.tensor(5), torch.tensor([True, False]), torch.tensor(0.1).double()]
    return {f"part/{index}": part for index, part in enumerate([*kinds, torch.zeros(0, 3), torch.ones(3).bfloat16()])}


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Slices of those that have a dimension; in one process as they are."""
    if here().size == 1:
        return tensors
    mesh = init_device_mesh("cpu", (here().size,))
    return {name: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for name, x in tensors.items()}


def saved(folder: Path, step: int) -> Path:
    moving = spread({f"moving/{name}": weight + 1 for name, weight in weights().items()})
    found = checkpoint.Checkpoint(step, spread(weights()), spread(moments()), STATE, {**parts(), **moving})
    return checkpoint.save(folder, found)


def assert_read(path: Path) -> None:
    """What is read into a student and its optimizer, spread as there are ranks, is what was written."""
    found = checkpoint.load(path)
    assert found.weights.shapes == {name: torch.Size(shape) for name, shape in SHAPES.items()}
    student = spread({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    found.fill("weights", student)
    assert_same(student, weights())
    optimizer = torch.optim.AdamW([torch.nn.Parameter(weight) for weight in student.values()], fused=True)
    checkpoint.restore_optimizer(optimizer, found)
    assert_same(checkpoint.optimizer_tensors(optimizer), moments())
    assert_same(dict(found.parts), {**parts(), **{f"moving/{name}": weight + 1 for name, weight in weights().items()}})


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(full(tensor), wanted[name]), name


@contextmanager
def ranks(count: int, rank: int, folder: Path, name: str) -> Iterator[None]:
    """Within, this process is one of so many ranks."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=count)
    world._here[0] = world._Ranks(rank, count, None)
    try:
        yield
    finally:
        world._here[0] = ONE
        distributed.destroy_process_group()


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks(3, rank, folder, "first"):
        saved(folder / "three", 1)
    if rank < 2:
        with ranks(2, rank, folder, "second"):
            saved(folder / "two", 1)
            for written in ("one", "two", "three"):
                assert_read(folder / written / "step-1")
            assert_refused_by_all(folder)
    with ranks(3, rank, folder, "third"):
        for written in ("one", "two", "three"):
            assert_read(folder / written / "step-1")
        assert_not_written(folder, rank)


def assert_refused_by_all(folder: Path) -> None:
    """Each rank verifies some of the files; what one of them finds, all say."""
    damaged = folder / "damaged" / "step-1"
    file = damaged / "weights" / "shard-00002-model-00001-of-00001.safetensors"
    if here().leads:
        shutil.copytree(folder / "two" / "step-1", damaged)
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        here().first(lambda: None)
        checkpoint.load(damaged)
    assert f"{file} is truncated or was changed after it was written; there is no earlier" in str(caught.value)


def assert_not_written(folder: Path, rank: int) -> None:
    """A disk that is full under one rank ends all, and leaves what was there before."""
    real = FileSystem.create_stream

    def no_space(self: FileSystem, path: Any, mode: str) -> Any:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, path, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", no_space)
        with pytest.raises(RunError, match=r"step-2: the disk is full.*; the last good checkpoint is .*step-1"):
            saved(folder / "three", 2)
    assert here().first(lambda: [path.name for path in (folder / "three").iterdir()]) == ["step-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that one process, two and three ranks wrote, after each of them read those of all."""
    folder = tmp_path_factory.mktemp("slices")
    saved(folder / "one", 1)
    start_processes(process, args=(folder,), nprocs=3, start_method=server().get_start_method())
    return folder


@pytest.mark.parametrize("written", ["one", "two", "three"])
def test_one_process_reads_what_ranks_wrote(folder: Path, written: str) -> None:
    assert not distributed.is_initialized()
    assert_read(folder / written / "step-1")


def test_a_rank_writes_its_slices_only(folder: Path) -> None:
    """The files of three ranks are a third each, and no pickle is among them."""
    place = folder / "three" / "step-1"
    files = [path for path in place.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert len(files) == 3 * 3 + 2
    one = slices.Stored([place / "weights" / "shard-00001-model-00001-of-00001.safetensors"])
    assert one.shapes == {"embedding": (3, 3), "norm": (2,), "head": (1, 4), "cube": (1, 3, 2)}


def _missing(file: Path, manifest: dict[str, str]) -> None:
    file.unlink()


def _flipped(file: Path, manifest: dict[str, str]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _unlisted(file: Path, manifest: dict[str, str]) -> None:
    del manifest[f"{file.parent.name}/{file.name}"]


def _gone(file: Path, manifest: dict[str, str]) -> None:
    file.unlink()
    del manifest[f"{file.parent.name}/{file.name}"]


@pytest.mark.parametrize("group", ["weights", "optimizer", "parts"])
@pytest.mark.parametrize("harm", [_missing, _flipped, _unlisted, _gone])
def test_a_damaged_slice_is_refused_and_the_one_before_named(
    folder: Path, tmp_path: Path, group: str, harm: Callable[[Path, dict[str, str]], None]
) -> None:
    for step in (0, 1):
        shutil.copytree(folder / "three" / "step-1", tmp_path / f"step-{step}")
    place = tmp_path / "step-1"
    manifest = json.loads((place / "manifest.json").read_text())
    harm(place / group / "shard-00002-model-00001-of-00001.safetensors", manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        checkpoint.load(place)
    said = str(caught.value)
    assert said.startswith(f"checkpoint refused: {place / group}")
    assert said.endswith(f"; resume from the one before it: --resume {tmp_path / 'step-0'}")
    assert "\n" not in said


def test_an_optimizer_of_another_model_is_refused(folder: Path) -> None:
    found = checkpoint.load(folder / "two" / "step-1")
    with pytest.raises(UserError, match=r"optimizer holds '0\.exp_avg', which is of no weight of this model"):
        checkpoint.restore_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(7, 4))]), found)


def test_large_slices_are_written_file_after_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_FILE_BYTES", 40)
    found = slices._files_of({"a": torch.zeros(8), "b": torch.zeros(2), "c": torch.zeros(1), "d": torch.zeros(99)})
    assert found == {"a": 1, "b": 1, "c": 2, "d": 3}
