"""Frozen models whose layers are spread over ranks: what a rank keeps, that ranks keep step, what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.sharding import full, layers_of, slice_of
from retort.ranks import World


class Two(World):
    """Rank 1 of two."""

    rank, size = 1, 2


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of two of which only this process exists: what it gathers of the other is not filled in."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def loaded(folder: Path, precision: Any = "fp32") -> LanguageModel:
    return load_model(str(folder), role="teacher", precision=precision, device=torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_keeps_slices_of_the_layers_and_the_rest_whole(
    model_folder: Callable[..., Path], precision: str
) -> None:
    lm = loaded(model_folder(seed=3, tie_word_embeddings=False), precision)
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    with alone():
        lm.spread_layers(Two())
        lm.spread_layers(Two())  # a model that is asked under two names is spread once
        inside = {id(p) for layer in layers_of(lm.model) for p in layer.parameters()}
        assert inside
        for name, p in lm.model.named_parameters():
            assert p.dtype == before[name].dtype and not p.requires_grad
            assert isinstance(p, DTensor) == (id(p) in inside), name
            halves = torch.chunk(before[name], 2)
            assert torch.equal(slice_of(p.detach()), halves[1] if id(p) in inside else before[name])
        assert isinstance(lm.kept_head().weight_VD, torch.nn.Parameter)
        assert not lm.sharding.spreads_head and lm.sharding.in_step
        with lm.whole():
            assert not any(isinstance(p, DTensor) for p in lm.model.parameters())
            assert not lm.sharding.in_step
        assert sum(isinstance(p, DTensor) for p in lm.model.parameters()) == len(inside)


class Busy(World):
    """A rank beside one that makes three passes."""

    size = 2

    def each(self, work: Callable[[], Any]) -> list[Any]:
        return [work(), 3]


@pytest.mark.parametrize("read", [3, 1, 0])
def test_a_rank_with_less_to_read_keeps_step(model_folder: Callable[..., Path], read: int) -> None:
    """It makes as many passes as the busiest rank; what it reads stays what it is."""
    texts = [TokenSequence.of([5 + n]).then([9, 12 + n, 7], decided=True) for n in range(3)]
    lm, passes = loaded(model_folder(seed=3)), list[int]()
    expected_ND = lm.all_hidden(texts, 4)
    lm.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    lm.sharding._modules, lm.sharding._world, lm.sharding._only_layers = [lm.model], Busy(), True
    found_ND = lm.all_hidden(texts[:read], 4)
    assert len(passes) == 3
    assert found_ND.shape[1] == expected_ND.shape[1]
    assert torch.equal(found_ND, expected_ND[: len(found_ND)]) and len(found_ND) == 3 * read


def test_families_that_do_not_name_their_layers_are_refused(model_folder: Callable[..., Path]) -> None:
    lm = loaded(model_folder(seed=3))
    lm.model._no_split_modules = None
    with pytest.raises(UserError, match="does not say which of its modules are layers.*ranks.teacher = sharded"):
        lm.spread_layers(Two())
    lm = loaded(model_folder(seed=3))
    first, second = layers_of(lm.model)[:2]
    second.mlp = first.mlp
    with pytest.raises(UserError, match="has layers that share parameters"):
        lm.spread_layers(Two())
    assert full(next(lm.model.parameters())) is next(lm.model.parameters())  # nothing was spread
