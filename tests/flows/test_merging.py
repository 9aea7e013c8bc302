"""The merged start: means of factors, of products and of weights, against numbers computed by hand in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flow_models import small, tuned
from torch import Tensor, nn

from retort.core.head import LowRank
from retort.errors import UserError
from retort.flows.lora import add_lora, merged_state, save_adapter
from retort.flows.merging import mean_of_factors, mean_of_products, merged_start

# Two experts of rank 1, scales 2 and 1: products [[0, 4], [0, 0]] and [[3, 0], [6, 0]].
ONE = LowRank(torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0], [0.0]]).double(), 2.0)
TWO = LowRank(torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[1.0], [2.0]]).double(), 1.0)


def product(factors: LowRank) -> Tensor:
    return factors.scaling * (factors.up_VQ @ factors.down_QD)


def test_the_mean_of_factors_by_hand() -> None:
    mean = mean_of_factors({"one": {"q": ONE}, "two": {"q": TWO}})["q"]
    # A = [1.5, 0.5]; B = ([2, 0] + [1, 2] / 2) / 2 = [1.25, 0.5], times 2.
    assert mean.down_QD.tolist() == [[1.5, 0.5]]
    assert mean.up_VQ.tolist() == [[1.25], [0.5]]
    assert product(mean).tolist() == [[3.75, 1.25], [1.5, 0.5]]
    assert product(mean).dtype == torch.float64


def test_the_mean_of_products_by_hand_is_another_matrix() -> None:
    mean = mean_of_products({"one": {"q": ONE}, "two": {"q": TWO}})["q"]
    assert product(mean).tolist() == [[1.5, 2.0], [3.0, 0.0]]


def test_of_one_expert_both_are_the_expert() -> None:
    for mean in (mean_of_factors, mean_of_products):
        assert torch.equal(product(mean({"one": {"q": ONE}})["q"]), product(ONE))


def adapters(folder: Path, ranks: tuple[int, ...] = (2, 2), alpha: float = 3.0) -> list[Path]:
    """Experts over the small flow of `small()`, and where they are."""
    for place, rank in enumerate(ranks):
        made = add_lora(small().module, rank=rank, alpha=alpha + place, name="base", seed=place)
        (folder / str(place)).mkdir()
        save_adapter(tuned(made, seed=place), folder / str(place))
    return [folder / str(place) for place in range(len(ranks))]


def products_of(folder: Path) -> dict[str, Tensor]:
    """s B A by layer, computed from the files."""
    from safetensors.torch import load_file

    from retort.files import read_object

    found = load_file(folder / "adapter_model.safetensors")
    config = read_object(folder / "adapter_config.json")
    names = [name.removesuffix(".lora_A.weight") for name in found if name.endswith("lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): config["lora_alpha"]
        / config["r"]
        * (found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double())
        for name in names
    }


@pytest.mark.parametrize("adapted", [False, True])
def test_products_change_the_weights_by_their_mean(adapted: bool, tmp_path: Path) -> None:
    student = small()
    before = merged_state(student.module)
    before = {name: value.clone() for name, value in before.items()}
    if adapted:
        add_lora(student.module, rank=3, alpha=1.0)
    experts = adapters(tmp_path, ranks=(2, 4))
    merged_start(student, experts, products=True)
    one, two = (products_of(folder) for folder in experts)
    after = merged_state(student.module)
    for name, value in after.items():
        layer = name.removesuffix(".weight")
        wanted = before[name] + (one[layer] + two[layer]) / 2 if layer in one else before[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-7)


def test_factors_give_the_same_model_with_and_without_an_adapter_of_the_students(tmp_path: Path) -> None:
    plain, adapted = small(), small()
    base = {name: value.clone() for name, value in merged_state(adapted.module).items()}
    own = add_lora(adapted.module, rank=2, alpha=7.0)
    experts = adapters(tmp_path)
    for student in (plain, adapted):
        merged_start(student, experts)
    one, two = merged_state(plain.module), merged_state(adapted.module)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
    assert any(not torch.allclose(base[name], two[name]) for name in base)
    with own.off():  # the base beneath is untouched, and can be a reference
        assert all(torch.equal(base[own.own_name(name) or ""], own_) for name, own_ in weights_beneath(adapted.module))


def weights_beneath(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if "lora_" not in name]


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_become_their_mean(adapted: bool, tmp_path: Path) -> None:
    student, opened, saved = small(seed=1), small(seed=2), small(seed=3)
    saved.save(tmp_path / "saved")
    if adapted:
        add_lora(student.module, rank=2, alpha=1.0)
    merged_start(student, [opened, tmp_path / "saved"])
    one, two = opened.module.state_dict(), saved.module.state_dict()
    for name, value in merged_state(student.module).items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-12)


def test_what_has_no_mean_is_refused_in_a_line(tmp_path: Path) -> None:
    student = small()
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    experts = adapters(tmp_path, ranks=(2, 4))
    with pytest.raises(UserError, match="factors have no mean across ranks, set flow.start = merge_products"):
        merged_start(student, experts)
    with pytest.raises(UserError, match="has weights of its own, which have no mean"):
        merged_start(student, [experts[0], small()])
    with pytest.raises(UserError, match="there is no expert to merge"):
        merged_start(student, [])
    with pytest.raises(UserError, match="only experts of one architecture are merged"):
        merged_start(student, [small(), small(width=24)])
    with pytest.raises(UserError, match="not of the student's architecture"):
        merged_start(student, [small(width=24), small(width=24)])
    assert all(torch.equal(before[name], value) for name, value in student.module.state_dict().items())


def test_an_adapter_of_the_students_that_differs_is_refused(tmp_path: Path) -> None:
    experts = adapters(tmp_path)
    wide, few = small(), small()
    add_lora(wide.module, rank=4, alpha=1.0)
    with pytest.raises(UserError, match="have rank 2 .* the student's has rank 4; set lora.rank = 2"):
        merged_start(wide, experts)
    add_lora(few.module, rank=2, alpha=1.0, targets=["to_q"])
    with pytest.raises(UserError, match="the student's adapter does not adapt layer"):
        merged_start(few, experts)


def test_adapters_over_different_bases_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_adapter(add_lora(small().module, rank=2, alpha=1.0, name=f"base {name}"), tmp_path / name)
    with pytest.raises(UserError, match="an adapter over base one, and .*two one over base two"):
        merged_start(small(), [tmp_path / "one", tmp_path / "two"])
