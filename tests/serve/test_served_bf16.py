"""A teacher in bf16 behind a server: the run is that with the same teacher in bf16 in its process, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import connected, in_thread

from retort import config as configuration
from retort.core.sequences import TokenSequence
from retort.models.load import load_model
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")


def teacher(model_folder: Callable[..., Path], precision: Any) -> Any:
    folder = model_folder(seed=2, hidden_size=24, padded_to=64)  # that of `tiny_run`
    return load_model(str(folder), role="teacher", precision=precision, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    return teacher(model_folder, "bf16")


@pytest.fixture(scope="module")
def url(lm: Any) -> Iterator[str]:
    with in_thread(lm) as found:
        yield found


def weights(settings: dict[str, Any], folder: Path, **changed: Any) -> bytes:
    runner.start(configuration.resolve(settings | changed), folder).go()
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["eopd", "gkd"])  # numbers of the server's, and hidden states
def test_a_run_is_the_local_one_to_the_last_bit(
    method: str, tiny_run: dict[str, Any], url: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = tiny_run | {"method": {"name": method}, "precision": "bf16", "steps": 1, "eval": {"problems": 0}}
    local = weights(settings, tmp_path / "local")
    assert weights(settings, tmp_path / "served", teacher=url) == local
    with in_thread(teacher(model_folder, "fp32")) as exact:
        assert weights(settings, tmp_path / "exact", teacher=exact) != local, "its precision is that of the server"


def test_states_and_head_travel_in_bf16_and_a_run_in_fp32_takes_them(lm: Any, url: str) -> None:
    served = connected(url, lm)  # asks for fp32
    assert (served.precision, served.head().weight_VD.dtype) == ("bf16", torch.bfloat16)
    sequences = [TokenSequence.of([5, 6]).then([7 + n, 9, 2], decided=True) for n in range(3)]
    here, there = (one.all_hidden(sequences, 64) for one in (lm, served))
    assert there.dtype == torch.bfloat16
    torch.testing.assert_close(there, here, rtol=0, atol=0)
