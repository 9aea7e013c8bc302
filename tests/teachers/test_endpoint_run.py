"""Runs that learn from a teacher behind a server of completions, beside runs with that teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from completions import Server, serving
from image_models import make_image_model
from imaged import picture

from retort import config as configuration
from retort.errors import UserError
from retort.train import runner
from retort.train.output.summary import summary


@pytest.fixture(scope="module")
def teacher(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=2, hidden_size=24)


@pytest.fixture(scope="module")
def server(teacher: Path) -> Iterator[Server]:
    with serving(teacher) as found:
        yield found


def run(tiny_run: dict[str, Any], out: Path, teacher: str, method: dict[str, Any], **more: Any) -> Any:
    short = {"teacher": teacher, "method": method, "steps": 2, "eval": {"problems": 0}}
    return runner.start(configuration.resolve(tiny_run, short, more), out).go()


@pytest.mark.parametrize(
    ("offers", "method"),
    [
        ("max=20", {"name": "opd"}),
        ("max=20", {"name": "vopd"}),
        ("max=-1", {"name": "eopd"}),
        ("max=-1", {"name": "gkd"}),
    ],
    ids=["opd", "vopd", "eopd", "gkd"],
)
def test_the_losses_of_a_run_are_those_of_the_local_one(
    tiny_run: dict[str, Any], tmp_path: Path, server: Server, teacher: Path, offers: str, method: dict[str, Any]
) -> None:
    far = run(tiny_run, tmp_path / "far", f"{server.url}/{offers}", method)
    near = run(tiny_run, tmp_path / "near", str(teacher), method)
    assert [row["loss"] for row in far.metrics] == pytest.approx([row["loss"] for row in near.metrics], abs=1e-4)
    assert f"{server.url}/{offers} gives" in " ".join(far.prepared.notes)


def test_a_bound_of_the_entropy_is_refused_or_flagged(tiny_run: dict[str, Any], tmp_path: Path, server: Server) -> None:
    address = f"{server.url}/max=20"
    with pytest.raises(UserError, match=r"'eopd' needs entropy from 'teacher'.*methods that it serves: .*opd"):
        run(tiny_run, tmp_path / "refused", address, {"name": "eopd"})
    assert not (tmp_path / "refused").exists(), "nothing was begun"
    found = run(
        tiny_run, tmp_path / "used", address, {"name": "eopd", "entropy_bound": "use", "entropy_threshold": 1.0}
    )
    assert all(row["teacher_entropy_bound"] > 0 for row in found.metrics)
    assert not any("teacher_entropy" in row for row in found.metrics)
    assert "a lower bound of its entropy" in summary(found.prepared)["asked of teacher"]


def test_what_only_a_model_in_this_process_can_do_is_refused(
    tiny_run: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    address = f"{server.url}/max=20"
    with pytest.raises(UserError, match=r"'gkd' needs the whole distribution.*methods that it serves"):
        run(tiny_run, tmp_path / "a", address, {"name": "gkd"})
    with pytest.raises(UserError, match="learns from completions that the teacher generates"):
        run(tiny_run, tmp_path / "b", address, {"name": "opd"}, cold_start={"steps": 1})
    with pytest.raises(UserError, match=r"at temperature 0.8.*method.temperature=1"):
        run(tiny_run, tmp_path / "c", address, {"name": "opd", "temperature": 0.8})
    with pytest.raises(UserError, match=r"it has no model 'big'"):
        run(tiny_run, tmp_path / "d", address, {"name": "opd"}, server={"model": "big"})
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_scores_of_weights_that_nobody_names_are_not_stored(
    tiny_run: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    address, cache = f"{server.url}/max=20", tmp_path / "cache"
    with pytest.raises(UserError, match=r"teacher = http.*does not say which weights it has.*`retort serve`") as caught:
        run(tiny_run, tmp_path / "refused", address, {"name": "opd"}, cache={"dir": str(cache)})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists(), "nothing was begun"
    assert not cache.exists()


def test_images_are_refused_before_anything_is_generated(
    tiny_run: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    student = make_image_model(tmp_path / "student", "llava")
    (tmp_path / "image.png").write_bytes(picture().encoded())
    (tmp_path / "data.jsonl").write_text('{"prompt": "what ?", "images": ["image.png"], "answer": "a"}\n')
    images = {"student": str(student), "data": str(tmp_path / "data.jsonl")}
    address = f"{server.url}/max=20"
    with pytest.raises(UserError, match=f"holds an image, and the teacher {address} reads text alone") as refused:
        run(tiny_run, tmp_path / "run", address, {"name": "opd"}, **images)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists(), "nothing was begun"
