"""Several teachers of which a server holds some: a run with them is the local one, or is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from completions import Server, serving
from served import in_thread

from retort import api
from retort.errors import UserError
from retort.models.load import load_model
from retort.preflight.doctor import examine_setup
from retort.train import runner
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import prepare

pytestmark = pytest.mark.usefixtures("models_kept")

NAMES = ["sums", "others"]


@pytest.fixture(scope="module")
def folders(model_folder: Callable[..., Path]) -> dict[str, Path]:
    return {"sums": model_folder(seed=2, hidden_size=24), "others": model_folder(seed=3)}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[str]:
    """The address of one of them behind `retort serve`."""
    lm = load_model(str(folders["others"]), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as url:
        yield url


@pytest.fixture(scope="module")
def completions(folders: dict[str, Path]) -> Iterator[Server]:
    """The same behind a server of completions."""
    with serving(folders["others"]) as found:
        yield found


@pytest.fixture
def settings(
    tiny_run: dict[str, Any], folders: dict[str, Path], prompts_file: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Settings of a run of two steps; `others` is where that model is, its folder if nothing is said."""
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    data = tmp_path / "domains.jsonl"
    data.write_text("".join(json.dumps(row | {"domain": NAMES[i % 2]}) + "\n" for i, row in enumerate(rows)))

    def made(others: str | None = None, *, method: str = "opd", bits: int | None = None, **teachers: Any) -> Any:
        rest = {name: value for name, value in tiny_run.items() if name != "teacher"}
        more = {} if bits is None else {"bits": bits}
        models = {"sums": {"path": str(folders["sums"])}, "others": {"path": others or str(folders["others"]), **more}}
        own = {"models": NAMES, **teachers}
        method_table = {"name": method, **({"samples": 2} if method == "opd" else {})}
        short = {"steps": 2, "eval": {"problems": 0}, "record": {"overlap_every": 1}, "checks": "warn"}
        return rest | {"data": str(data), "models": models, "teachers": own, "method": method_table} | short

    return made


def weights(run: runner.Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("combine", ["route", "mixture", "product", "best"])
def test_with_one_behind_retort_serve_it_is_the_local_run_to_the_last_bit(
    settings: Callable[..., Any], served: str, tmp_path: Path, combine: str
) -> None:
    local = runner.start(api.assemble(settings(combine=combine)), tmp_path / "local").go()
    far = runner.start(api.assemble(settings(served, combine=combine)), tmp_path / "far").go()
    assert weights(local) == weights(far)
    apart = [[row["teacher_disagreement"] for row in run.metrics] for run in (local, far)]
    assert apart[0] == apart[1] and min(apart[0]) > 0
    assert list(far.prepared.teachers.remote) == ["others"], "it is asked whether it is still the same model"


def test_one_behind_a_server_of_completions_that_lists_all_ids_says_what_it_says_here(
    settings: Callable[..., Any], completions: Server, tmp_path: Path
) -> None:
    address = f"{completions.url}/max=-1"
    local = runner.start(api.assemble(settings(combine="product")), tmp_path / "local").go()
    far = runner.start(api.assemble(settings(address, combine="product")), tmp_path / "far").go()
    assert [row["loss"] for row in far.metrics] == pytest.approx([row["loss"] for row in local.metrics], abs=1e-4)
    assert forecast(far.prepared).signals > 0
    assert "tokenizer of sums" in [check.name for check in examine_setup(far.prepared, quick=True).checks]


def test_one_that_lists_some_ids_speaks_where_that_is_enough(
    settings: Callable[..., Any], completions: Server, tmp_path: Path
) -> None:
    local = runner.start(api.assemble(settings()), tmp_path / "local").go()
    far = runner.start(api.assemble(settings(f"{completions.url}/max=20,at=0")), tmp_path / "far").go()
    assert [row["loss"] for row in far.metrics] == pytest.approx([row["loss"] for row in local.metrics], abs=1e-4)
    assert "teacher_disagreement" not in far.metrics[0], "which takes whole distributions"


@pytest.mark.parametrize(
    ("method", "combine", "line"),
    [
        ("gkd", "route", "'gkd' needs the whole distribution from 'teacher'"),
        ("eopd", "mixture", "'eopd' needs .* from 'teacher'"),
        ("opd", "product", "others does not give whole distributions, without which a product cannot be normalised"),
    ],
)
def test_one_that_lists_some_ids_is_refused_where_more_is_needed(
    settings: Callable[..., Any], completions: Server, tmp_path: Path, method: str, combine: str, line: str
) -> None:
    asked = settings(f"{completions.url}/max=20,at=16", method=method, combine=combine)
    with pytest.raises(UserError, match=line) as refused:
        runner.start(api.assemble(asked), tmp_path / "run").go()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_server_rounds_no_weights(settings: Callable[..., Any], served: str, completions: Server) -> None:
    for address in (served, f"{completions.url}/max=20"):
        with pytest.raises(UserError, match="others http.*: bits = 8 is for weights that are loaded here"):
            prepare(api.assemble(settings(address, bits=8)))
