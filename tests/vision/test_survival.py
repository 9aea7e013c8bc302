"""A run on images survives: kill -9, and files that were changed or removed while it lay."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed
from imaged import picture, seeing
from safetensors.torch import load_file

from retort import config as configuration
from retort.errors import UserError
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data, a run `whole`, and one that was killed at its third step of four, `killed`."""
    folder = tmp_path_factory.mktemp("stopped")
    seeing(folder)
    settings: dict[str, Any] = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data.jsonl"),
        "method": {"name": "va_opd"},
        "task": "exact",
        "precision": "fp32",
        "device": "cpu",
        "checks": "warn",
        "steps": 4,
        "rollout": {"prompts": 2, "max_new_tokens": 6, "max_prompt_tokens": 128},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2},
        "eval": {"problems": 0},
    }
    runner.start(configuration.resolve(settings), folder / "whole").go()
    assert killed(settings, folder / "killed", 3) == -signal.SIGKILL
    return folder


def resumed(folder: Path, at: Path) -> Path:
    """Copies the killed run and goes on with it."""
    shutil.copytree(folder / "killed", at)
    runner.resume(at).go()
    return at


def test_kill_9_and_resume_is_bit_identical(stopped: Path, tmp_path: Path) -> None:
    again = resumed(stopped, tmp_path / "run")
    whole, found, first = (
        load_file(path / "model.safetensors")
        for path in (stopped / "whole" / "model", again / "model", stopped / "student")
    )
    assert whole.keys() == found.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, found[name]), name
    tower = [name for name in whole if "vision_tower" in name]
    assert any(not torch.equal(whole[name], first[name]) for name in tower), "the tower learnt nothing"
    for name in ("rollouts.jsonl", "answers.jsonl"):
        if (stopped / "whole" / name).exists():
            assert (stopped / "whole" / name).read_text() == (again / name).read_text()
    assert {file.name for file in (again / "thumbnails").iterdir()} == {
        file.name for file in (stopped / "whole" / "thumbnails").iterdir()
    }


@pytest.mark.parametrize("how", ["changed", "removed", "broken"])
def test_a_run_whose_image_is_not_what_it_was_is_not_resumed(stopped: Path, tmp_path: Path, how: str) -> None:
    file, kept = stopped / "1.png", (stopped / "1.png").read_bytes()
    contents = {"changed": picture(50).encoded(), "broken": kept[:60]}
    try:
        file.unlink()
        if how in contents:
            file.write_bytes(contents[how])
        with pytest.raises(UserError, match="1.png|data") as error:
            resumed(stopped, tmp_path / "run")
    finally:
        file.write_bytes(kept)
    assert "\n" not in str(error.value)
    print(error.value)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_the_card_says_how_to_use_a_student_that_reads_images_and_that_works(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stopped / "whole" / "model"
    text = (model / "README.md").read_text()
    assert "\npipeline_tag: image-text-to-text\n" in text
    assert "\n- images: in 5 of these prompts; the vision tower learnt\n" in text
    code = text.split("```python\n")[1].split("```")[0]
    (model / "picture.png").write_bytes(picture(1).encoded())
    monkeypatch.chdir(model)
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        (model / "picture.png").unlink()
    assert capsys.readouterr().out.strip()
