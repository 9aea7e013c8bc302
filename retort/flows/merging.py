r"""The cold start of Flow-OPD by merging: the student begins as the mean of its experts.

Of LoRA experts, the paper's best is the mean of the factors, :math:`s \bar B \bar A`, which is another matrix than the
mean of the products, :math:`\overline{s B A}`. Of experts with weights of their own it is the mean of the weights.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.core.head import LowRank
from retort.errors import UserError
from retort.flows import lora
from retort.flows.base import VelocityModel
from retort.flows.load import is_adapter, open_flow
from retort.models.adapter import NAME, Adapter

Expert = str | Path | VelocityModel


@torch.no_grad()
def merged_start(student: VelocityModel, experts: Sequence[Expert], *, products: bool = False) -> None:
    """Gives a student the mean of its experts, in place.

    LoRA experts must be adapters over the student's own weights. The mean of the factors becomes the student's adapter
    if it has one (of the same rank, on the same layers), and otherwise is added to its weights. The mean of the
    products has a higher rank than an adapter, so it is added to the weights in any case, and the student's adapter
    begins at 0: such an adapter by itself belongs to the merged weights, not to the original base.

    Experts with weights of their own: the student's weights become their mean, and its adapter begins at 0.

    Args:
        student: The student, whose module may hold an adapter.
        experts: Folders of adapters; or folders, hub names or opened models with weights of their own.
        products: Of adapters: the mean of the products instead of the mean of A and of B.

    Raises:
        UserError: No expert; adapters mixed with weights; adapters of different bases, layers or (for the mean of the
            factors) ranks; weights that are not of the student's architecture.
    """
    if not experts:
        raise UserError("flow.start: there is no expert to merge")
    adapters = [not isinstance(expert, VelocityModel) and is_adapter(expert) for expert in experts]
    if all(adapters):
        _merge_adapters(student, [Path(str(expert)).expanduser() for expert in experts], products=products)
    elif any(adapters):
        one, other = experts[adapters.index(True)], experts[adapters.index(False)]
        raise UserError(
            f"flow.start: {one} is an adapter and {_name(other)} has weights of its own, which have no mean; merge the "
            "adapter into its base first, or set flow.start = student"
        )
    else:
        _set_weights(student, _mean_weights(experts))


def mean_of_factors(experts: Mapping[str, Mapping[str, LowRank]]) -> dict[str, LowRank]:
    r"""The mean of A and the mean of B, layer by layer; a scale that differs counts in B.

    .. math:: A = \frac1n \sum_i A_i, \quad B = \frac1n \sum_i \frac{s_i}{s_1} B_i, \quad s = s_1

    Args:
        experts: Factors by the names of experts.

    Raises:
        UserError: Layers or ranks differ.

    Example:
        >>> from torch import tensor
        >>> from retort.core.head import LowRank
        >>> from retort.flows.merging import mean_of_factors
        >>> one = {"to_q": LowRank(tensor([[1.0, 0.0]]), tensor([[2.0]]))}
        >>> two = {"to_q": LowRank(tensor([[0.0, 1.0]]), tensor([[4.0]]))}
        >>> mean = mean_of_factors({"one": one, "two": two})["to_q"]
        >>> mean.up_VQ @ mean.down_QD  # the mean of the products is [1, 2]
        tensor([[1.5000, 1.5000]])
    """
    found = dict[str, LowRank]()
    (first_name, first), *_ = experts.items()
    for name in _same_layers(experts):
        parts = {expert: layers[name] for expert, layers in experts.items()}
        for expert, part in parts.items():
            if part.down_QD.shape != first[name].down_QD.shape or part.up_VQ.shape != first[name].up_VQ.shape:
                raise UserError(
                    f"flow.start: layer '{name}' is {_shape(first[name])} in {first_name} and {_shape(part)} in "
                    f"{expert}; factors have no mean across ranks, set flow.start = merge_products"
                )
        scaling = first[name].scaling or 1.0
        down = torch.stack([part.down_QD for part in parts.values()]).mean(0)
        up = torch.stack([part.up_VQ * (part.scaling / scaling) for part in parts.values()]).mean(0)
        found[name] = LowRank(down, up, scaling)
    return found


def mean_of_products(experts: Mapping[str, Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """The mean of s B A, layer by layer, exactly, as factors of the ranks together.

    Args:
        experts: As in `mean_of_factors`; ranks may differ.

    Raises:
        UserError: Layers differ.
    """
    return {
        name: LowRank(
            torch.cat([layers[name].down_QD for layers in experts.values()]),
            torch.cat([layers[name].up_VQ * layers[name].scaling for layers in experts.values()], dim=1),
            1.0 / len(experts),
        )
        for name in _same_layers(experts)
    }


def _same_layers(experts: Mapping[str, Mapping[str, LowRank]]) -> list[str]:
    (first_name, first), *others = experts.items()
    for name, layers in others:
        odd = sorted(first.keys() ^ layers.keys())
        if odd:
            there, lacking = (first_name, name) if odd[0] in first else (name, first_name)
            raise UserError(
                f"flow.start: {there} adapts layer '{odd[0]}' and {lacking} does not; only adapters of the same layers "
                "are merged"
            )
    return list(first)


def _merge_adapters(student: VelocityModel, folders: Sequence[Path], *, products: bool) -> None:
    bases = dict[str, Path]()
    experts = dict[str, dict[str, LowRank]]()
    for folder in folders:
        label = f"expert {folder}"
        base = lora.read_settings(label, folder).get("base_model_name_or_path")
        if base:
            bases.setdefault(str(base), folder)
        experts[str(folder)] = lora.read_factors(label, folder)
    if len(bases) > 1:
        (one, first), (two, second), *_ = bases.items()
        raise UserError(
            f"flow.start: {first} is an adapter over {one}, and {second} one over {two}; only adapters over the same "
            "base are merged"
        )
    own = lora.adapter_in(student.module)
    if products or own is None:
        merged = mean_of_products(experts) if products else mean_of_factors(experts)
        lora.add_product(student.module, merged, "flow.start: the experts' mean")
    else:
        _into_adapter(own, mean_of_factors(experts))


def _into_adapter(own: Adapter, merged: Mapping[str, LowRank]) -> None:
    """Gives the student's adapter the experts' mean."""
    layers = {name: (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight) for name, layer in own.layers.items()}
    odd = sorted(layers.keys() ^ merged.keys())
    if odd:
        what = "adapts" if odd[0] in layers else "does not adapt"
        raise UserError(
            f"flow.start: the student's adapter {what} layer '{odd[0]}', unlike the experts'; set lora.targets to the "
            "layers that they adapt, or flow.start = merge_products"
        )
    for name, (down, _) in layers.items():
        if down.shape != merged[name].down_QD.shape:
            raise UserError(
                f"flow.start: the experts' adapters have rank {len(merged[name].down_QD)} at layer '{name}', and the "
                f"student's has rank {len(down)}; set lora.rank = {len(merged[name].down_QD)}, or flow.start = "
                "merge_products"
            )
    for name, (down, up) in layers.items():
        down.copy_(merged[name].down_QD)
        up.copy_(merged[name].up_VQ * (merged[name].scaling / own.layers[name].scaling[NAME]))


def _mean_weights(experts: Sequence[Expert]) -> dict[str, Tensor]:
    """The mean of the experts' weights, summed in float64; one expert is in memory at a time."""
    total = dict[str, Tensor]()
    kinds = dict[str, torch.dtype]()
    for expert in experts:
        model = expert if isinstance(expert, VelocityModel) else open_flow(expert, role="expert")
        state = lora.merged_state(model.module)
        if total and {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in total.items()}:
            raise UserError(
                f"flow.start: {_name(expert)} has other weights than {_name(experts[0])} by name or shape; only "
                "experts of one architecture are merged"
            )
        for name, value in state.items():
            kinds[name] = value.dtype
            total[name] = total.get(name, 0.0) + value.detach().cpu().double()
    return {name: (value / len(experts)).to(kinds[name]) for name, value in total.items()}


def _set_weights(student: VelocityModel, weights: Mapping[str, Tensor]) -> None:
    """Gives the student's module weights, beneath an adapter that it may have."""
    own = lora.adapter_in(student.module)
    state: dict[str, Any] = student.module.state_dict()
    places = {name: name if own is None else own.own_name(name) for name in state}
    targets = {place: state[name] for name, place in places.items() if place is not None}
    odd = sorted(targets.keys() ^ weights.keys()) or [
        name for name, target in targets.items() if target.shape != weights[name].shape
    ]
    if odd:
        raise UserError(
            f"flow.start: the experts' weights are not of the student's architecture ('{odd[0]}'); name experts that "
            "were trained from the student"
        )
    for name, target in targets.items():
        target.copy_(weights[name])


def _name(expert: Expert) -> str:
    return "an opened model" if isinstance(expert, VelocityModel) else str(expert)


def _shape(factors: LowRank) -> str:
    return f"{len(factors.up_VQ)} x {factors.down_QD.shape[1]} of rank {len(factors.down_QD)}"
