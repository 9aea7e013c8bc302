"""A cache of scores by a model on a server: stored under what the server says of its weights, and found without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served import connected, in_thread

from retort import config as configuration
from retort.cli.score import score
from retort.errors import UserError
from retort.models.fingerprint import digests_of, fingerprint_of
from retort.models.load import load_model
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")

RATE = "teacher_cache/hit_rate"


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    folder = model_folder(seed=2, hidden_size=24, padded_to=64)
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def url(lm: Any) -> Iterator[str]:
    with in_thread(lm) as found:
        yield found


def run(settings: dict[str, Any], folder: Path, *more: dict[str, Any]) -> runner.Run:
    return runner.start(configuration.resolve(settings, *more), folder).go()


def weights(run: runner.Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def rates(run: runner.Run) -> list[float | None]:
    return [row.get(RATE) for row in run.metrics]


@pytest.mark.parametrize("method", ["opd", "gkd"], ids=["numbers of the server", "hidden states"])
def test_a_run_with_a_cache_is_the_run_without_it(
    method: str, tiny_run: dict[str, Any], url: str, tmp_path: Path
) -> None:
    settings = tiny_run | {"method": {"name": method}, "steps": 2, "teacher": url, "eval": {"problems": 0}}
    cache = {"cache": {"dir": str(tmp_path / "cache")}}
    plain, first, second = (
        run(settings, tmp_path / name, more) for name, more in (("plain", {}), ("first", cache), ("second", cache))
    )
    assert weights(plain) == weights(first) == weights(second)
    assert (rates(plain), rates(second)) == ([None, None], [1.0, 1.0])
    near = run(settings, tmp_path / "near", {"teacher": tiny_run["teacher"]}, cache)
    assert rates(near)[0] == 0.0, "what a server says of its weights stands for no model that was read here"
    assert weights(near) == weights(plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_whose_scores_are_stored_needs_no_server(
    precision: Any, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever precision the server computes in, it is not the run's."""
    lm = load_model(tiny_run["teacher"], role="teacher", precision=precision, device=torch.device("cpu"))
    method = {"name": "gkd", "on_policy_fraction": 0.0}
    settings = tiny_run | {"method": method, "steps": 2, "cache": {"dir": str(tmp_path / "cache")}}
    with in_thread(lm) as url:
        settings |= {"teacher": url, "server": {"patience": 0.1}}
        plain = run(settings, tmp_path / "plain", {"cache": {"dir": None}})
        assert score(configuration.resolve(settings))["stored_before"] == 0
    alone = run(settings, tmp_path / "alone", {"cache": {"only": True}})
    assert rates(alone) == [1.0, 1.0]
    losses = [[row["loss"] for row in own.metrics] for own in (plain, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "fp32" else 1e-2)
    with pytest.raises(UserError, match=r"retort serve MODEL.* cache.only=true runs from them alone") as caught:
        run(settings, tmp_path / "refused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_a_fingerprint_is_of_the_weights_and_of_how_they_are_read(
    lm: Any, url: str, model_folder: Callable[..., Path]
) -> None:
    other = load_model(
        str(model_folder(seed=3, hidden_size=24, padded_to=64)),
        role="teacher",
        precision="fp32",
        device=torch.device("cpu"),
    )
    with in_thread(lm) as again, in_thread(other) as another:
        same, moved = connected(url, lm), connected(again, lm)
        found = [fingerprint_of(own, digests_of(own)) for own in (same, lm, connected(another, lm))]
        assert fingerprint_of(moved, digests_of(moved)) == found[0], "an address is no model"
        narrow = connected(url, lm)
        narrow.server = replace(narrow.server, narrow=True)
        found.append(fingerprint_of(narrow, digests_of(narrow)))
    assert len(set(found)) == len(found)
