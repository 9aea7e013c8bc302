"""What is refused of models and prompts before a student decides its first denoising step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flowing import ROWS, flow, planes, settings
from PIL import Image

import retort
from retort import config as configuration
from retort.errors import UserError
from retort.train import runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("flows")
    planes(found)
    Image.new("RGB", (8, 8)).save(found / "dot.png")
    return found


def started(folder: Path, out: Path, *more: dict[str, Any]) -> None:
    data = folder / f"{out.name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in [*ROWS, *more]))
    runner.start(configuration.resolve(settings(folder, data=str(data))), out)


def test_an_image_in_a_prompt_is_not_left_aside(folder: Path, tmp_path: Path) -> None:
    row = {"id": "5", "prompt": "upper moon", "domain": "moons", "image": str(folder / "dot.png")}
    with pytest.raises(UserError, match="^row '5': its prompt has an image, and a flow model reads text alone"):
        started(folder, tmp_path / "run", row)
    assert not (tmp_path / "run").exists()


def test_a_word_that_nobody_knows_is_found_before_the_run_begins(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^student .*: prompt 'upper sun': this model does not know the word 'sun'"):
        started(folder, tmp_path / "run", {"id": "5", "prompt": "upper sun", "domain": "moons"})
    assert not (tmp_path / "run").exists()


def test_an_expert_need_not_know_the_words_of_others(folder: Path, tmp_path: Path) -> None:
    flow(7, words=("upper", "lower", "moon")).save(tmp_path / "narrow")
    models = {"moons": {"path": str(tmp_path / "narrow")}}
    given = settings(folder, steps=1, models=models)
    runner.start(configuration.resolve(given), tmp_path / "run")
    given["teachers"] = {"models": ["gaussians", "moons"]}
    with pytest.raises(UserError, match="^gaussians .*: prompt 'east gaussians'.* does not know the word 'east'"):
        models |= {"gaussians": {"path": str(tmp_path / "narrow")}, "moons": {"path": str(folder / "gaussians")}}
        runner.start(configuration.resolve({**given, "models": models}), tmp_path / "other")


class Detached:
    """A velocity model that forgets its gradient."""

    def __init__(self, seed: int) -> None:
        self.of = flow(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["of"], name)

    def velocity(self, *given: Any) -> Any:
        return self.of.velocity(*given).detach()

    def __deepcopy__(self, memo: Any) -> Any:
        return Detached(3)


def distilled(student: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "upper moon"}, {"prompt": "lower moon"}]
    given = {"eval": {"problems": 0}, "flow": {"steps": 3}, "rollout": {"prompts": 1}}
    retort.distill(
        student=student,
        teacher=flow(1),
        data=rows,
        method=retort.load("diffusion_opd", samples=2),
        steps=1,
        out=tmp_path / "run",
        quiet=True,
        settings=given,
    )


def test_a_student_must_have_something_that_learns(tmp_path: Path) -> None:
    frozen = flow(0)
    frozen.module.requires_grad_(False)
    with pytest.raises(UserError, match="none of its weights learns"):
        distilled(frozen, tmp_path)
    half = flow(0)
    half.module.to(torch.bfloat16)
    with pytest.raises(UserError, match="is torch.bfloat16, and what learns must be fp32"):
        distilled(half, tmp_path)


def test_what_a_velocity_model_lacks_is_named(tmp_path: Path) -> None:
    class Half:
        module, latent_shape, identity = None, (2,), {}

        def velocity(self) -> None: ...

    with pytest.raises(UserError, match="a Half is no velocity model: it has no condition, sigmas, decoded, save$"):
        distilled(Half(), tmp_path)


def test_a_velocity_without_gradient_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its velocity has no gradient"):
        distilled(Detached(0), tmp_path)
