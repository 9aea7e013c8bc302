"""LoRA in velocity models: it begins unchanged, merges exactly, and a folder of another kind is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import small, tuned
from safetensors.torch import load_file, save_file
from torch import nn

from retort.errors import UserError
from retort.flows.lora import add_lora, add_product, merged_state, read_factors, save_adapter
from retort.flows.small import SmallFlow


def predicted(flow: SmallFlow) -> torch.Tensor:
    latents = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sigmas_N = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    return flow.velocity(latents, sigmas_N, flow.condition(["ring", "", "moon ring"])).detach()


def test_an_adapter_begins_without_effect_and_its_factors_alone_learn() -> None:
    flow = small()
    before = predicted(flow)
    adapter = add_lora(flow.module, rank=2, alpha=4.0)
    assert torch.equal(predicted(flow), before)
    learn = {name for name, own in flow.module.named_parameters() if own.requires_grad}
    assert learn == adapter.tensors.keys() and all("lora_" in name for name in learn)
    assert {own.dtype for own in adapter.tensors.values()} == {torch.float64}
    adapted = {name.rpartition(".")[2] for name in adapter.layers}
    assert adapted <= {"to_q", "to_k", "to_v", "to_out"} and len(adapted) > 1


def test_switched_off_it_is_the_base_bit_by_bit() -> None:
    flow = small()
    before = predicted(flow)
    adapter = tuned(add_lora(flow.module, rank=2, alpha=4.0), seed=1)
    assert not torch.allclose(predicted(flow), before)
    with adapter.off():
        assert torch.equal(predicted(flow), before)


def test_a_is_drawn_from_a_stream_of_its_own() -> None:
    drawn = list[list[torch.Tensor]]()
    for seed, noise in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(noise)
        adapter = add_lora(small().module, rank=2, alpha=4.0, seed=seed)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(noise)))
        drawn.append(list(adapter.tensors.values()))
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not all(map(torch.equal, drawn[0], drawn[2]))


@pytest.mark.parametrize("targets", [("attention",), ("all-linear",), ("to_q", "to_v")])
def test_merged_the_saved_model_has_the_same_velocities(targets: tuple[str, ...], tmp_path: Path) -> None:
    flow = small()
    names = set(flow.module.state_dict())
    tuned(add_lora(flow.module, rank=2, alpha=3.0, targets=targets, rslora=True), seed=2)
    assert set(merged_state(flow.module)) == names
    flow.save(tmp_path / "merged")
    opened = SmallFlow.open(tmp_path / "merged")
    opened.module.double()
    torch.testing.assert_close(predicted(opened), predicted(flow), rtol=1e-6, atol=1e-6)


def test_an_adapters_folder_gives_the_same_model_over_the_base(tmp_path: Path) -> None:
    flow, base = small(), small()
    adapter = tuned(add_lora(flow.module, rank=2, alpha=3.0, name="the base"), seed=3)
    save_adapter(adapter, tmp_path)
    add_product(base.module, read_factors("expert x", tmp_path), "expert x")
    torch.testing.assert_close(predicted(base), predicted(flow))


def test_peft_opens_the_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    flow, base = small(), small()
    save_adapter(tuned(add_lora(flow.module, rank=2, alpha=3.0, name="the base"), seed=3), tmp_path)
    module: Any = base.module
    PeftModel.from_pretrained(module, str(tmp_path))
    torch.testing.assert_close(predicted(base), predicted(flow))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the base"


def test_a_target_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="^lora.targets: the model has no linear layer 'to_p'; did you mean 'to_[qkv]'"):
        add_lora(small().module, rank=2, alpha=4.0, targets=["to_p"])
    with pytest.raises(UserError, match="no projections of attention; set lora.targets=all-linear, .*: weight"):
        add_lora(nn.ModuleDict({"weight": nn.Linear(2, 2)}), rank=2, alpha=4.0)


def settings(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    file = "adapter_model.safetensors"
    return lambda folder: save_file(change(load_file(folder / file)), folder / file)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (settings(use_dora=True), "use_dora is True, and only plain LoRA adapters are read"),
    "kind": (settings(peft_type="IA3"), "peft_type is 'IA3'"),
    "start": (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "alpha": (settings(lora_alpha="8"), "lora_alpha is '8'; it must be a number"),
    "digits": (settings(lora_alpha=10**400), "it must be a number, at most 1e.06"),
    "pickled": (pickled, "adapter_model.bin is pickled, and unpickling can run code"),
    "no settings": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
    "half": (weights(lambda all_: dict(sorted(all_.items())[1:])), "has no two factors that fit"),
    "bias": (weights(lambda all_: {**all_, "base_model.model.x.bias": torch.zeros(1)}), "only the factors A and B"),
    "nan": (weights(lambda all_: {name: x / 0 for name, x in all_.items()}), "holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_folder_that_is_more_or_less_than_an_adapter_is_refused(kind: str, tmp_path: Path) -> None:
    save_adapter(add_lora(small().module, rank=2, alpha=4.0), tmp_path)
    damage, words = DAMAGED[kind]
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as refused:
        read_factors("expert x", tmp_path)
    assert str(refused.value).startswith("expert x: ") and "\n" not in str(refused.value)


def test_an_adapter_of_another_base_changes_nothing(tmp_path: Path) -> None:
    save_adapter(tuned(add_lora(small().module, rank=2, alpha=4.0), seed=1), tmp_path)
    factors = read_factors("expert x", tmp_path)
    wider = small(width=24)
    before = merged_state(wider.module)
    with pytest.raises(UserError, match="of the base has a weight .24, 24., and the adapter is for .16, 16."):
        add_product(wider.module, factors, "expert x")
    first = next(iter(factors))
    with pytest.raises(UserError, match="the base has no layer 'other.layer'"):
        add_product(small().module, {first: factors[first], "other.layer": factors[first]}, "expert x")
    assert all(torch.equal(before[name], own) for name, own in wider.module.state_dict().items())
