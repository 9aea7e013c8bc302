"""What is a flow, and how it is opened: small flows and adapters over them. Pipelines of diffusers: `make flow`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flow_models import small, tuned

from retort.errors import UserError
from retort.flows.base import VelocityModel
from retort.flows.load import is_flow, open_flow
from retort.flows.lora import add_lora, save_adapter
from retort.flows.small import SmallFlow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "base"
    small().save(folder)
    return folder


@pytest.fixture(scope="module")
def expert(base: Path) -> Path:
    flow = small()
    adapter = tuned(add_lora(flow.module, rank=2, alpha=4.0, name=str(base)), seed=1)
    folder = base.parent / "expert"
    folder.mkdir()
    save_adapter(adapter, folder)
    return folder


def test_a_flow_is_known_by_its_folder(
    base: Path, expert: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    assert is_flow(base) and is_flow(expert) and is_flow(pipeline) and is_flow(str(base))
    text = model_folder()
    assert not any(
        map(is_flow, (text, tmp_path, tmp_path / "none", text / "config.json", "owner/name", "http://x/y", ""))
    )
    over_text = tmp_path / "over text"
    over_text.mkdir()
    (over_text / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(text)}))
    assert not is_flow(over_text) and is_flow(over_text, base)
    (over_text / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(over_text)}))
    assert not is_flow(over_text)


def velocity(flow: VelocityModel) -> torch.Tensor:
    flow.module.double()
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return flow.velocity(latents, torch.tensor([0.7, 0.3]).double(), flow.condition(["ring", ""])).detach()


def test_only_a_students_module_learns(base: Path) -> None:
    student, teacher = open_flow(base, role="student"), open_flow(base, role="teacher")
    assert isinstance(student, SmallFlow)
    assert all(own.requires_grad for own in student.module.parameters())
    assert not any(own.requires_grad for own in teacher.module.parameters())


def test_an_adapter_is_opened_over_the_base_that_it_names_or_another(base: Path, expert: Path) -> None:
    wanted = small()
    tuned(add_lora(wanted.module, rank=2, alpha=4.0), seed=1)
    named = open_flow(expert, role="teacher")
    torch.testing.assert_close(velocity(named), velocity(wanted), rtol=1e-6, atol=1e-6)
    opened = open_flow(base, role="student")
    before = velocity(opened)
    over = open_flow(expert, role="teacher", base=opened)
    torch.testing.assert_close(velocity(over), velocity(named), rtol=1e-6, atol=1e-6)
    assert torch.equal(velocity(opened), before) and over is not opened


def test_an_opened_model_is_no_base_where_the_adapter_names_another_that_is_there(expert: Path, tmp_path: Path) -> None:
    small(seed=4).save(tmp_path / "other")
    other = open_flow(tmp_path / "other", role="student")
    over = open_flow(expert, role="teacher", base=other)
    torch.testing.assert_close(velocity(over), velocity(open_flow(expert, role="teacher")))


def test_a_base_that_has_an_adapter_already_is_a_mistake(base: Path, expert: Path) -> None:
    student = open_flow(base, role="student")
    add_lora(student.module, rank=2, alpha=1.0)
    with pytest.raises(ValueError, match="open the experts before"):
        open_flow(expert, role="teacher", base=student)


def test_what_cannot_be_opened_is_said_in_a_line(base: Path, expert: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, words: str, **more: int | str | None) -> None:
        with pytest.raises(UserError, match=words) as error:
            open_flow(path, role="teacher", **more)  # type: ignore[arg-type]
        assert str(error.value).startswith(f"teacher {path}: ") and "\n" not in str(error.value)

    refused(base, "flow.height = 32, and this model makes images of 8 x 8 pixels; leave flow.height out", height=32)
    file = expert / "adapter_config.json"
    whole = file.read_text()
    file.write_text(json.dumps({**json.loads(whole), "base_model_name_or_path": None}))
    refused(expert, "names no base")
    refused(expert, "is an adapter, too", base=str(expert))
    file.write_text(whole)
    broken = tmp_path / "broken"
    small().save(broken)
    (broken / "model.safetensors").write_bytes(b"\0")
    refused(broken, "model.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is not None, reason="diffusers is installed")
def test_a_pipeline_without_diffusers_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="pip install 'retort-distill.flow.'"):
        open_flow(tmp_path, role="student")
