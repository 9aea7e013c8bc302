r"""LoRA adapters in velocity models, by `peft`: putting one in, merging it, reading the factors of a folder.

A layer's product gains :math:`s\,B A x` (Hu et al. 2021, arXiv 2106.09685); s is alpha / rank.
"""

# pyright: basic
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retort.core.head import LowRank
from retort.errors import UserError, counted, did_you_mean, quoted
from retort.files import read_object, reason
from retort.models.adapter import Adapter, need_peft
from retort.models.lora import ALL_LINEAR, put_in

#: The word for all projections of attention, which Flow-OPD adapts.
ATTENTION = "attention"
#: Their names in `diffusers`, and in Retort's own small flows.
PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: The file and the prefix by which `load_lora_weights` of diffusers finds an adapter.
DIFFUSERS_WEIGHTS, _TRANSFORMER = "pytorch_lora_weights.safetensors", "transformer."
#: Largest `lora_alpha` that is read; an integer of JSON may have any number of digits.
_MOST_ALPHA = 1e6
_DOWN, _UP, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."
#: Settings of an adapter's folder under which it is more than two factors per layer, or over other weights.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (ATTENTION,),
    rslora: bool = False,
    seed: int = 0,
    name: str = "",
) -> Adapter:
    """Puts a LoRA adapter into the module of a velocity model, in place, and freezes all else.

    B begins at 0, so the velocities begin unchanged; `Adapter.off` gives the model without it.

    Args:
        module: `VelocityModel.module`.
        rank: Number of rows of A (32 in Flow-OPD).
        alpha: The scale is s = alpha / rank (64 in Flow-OPD).
        targets: Names of linear layers, or their ends (`to_q`); `attention`: all projections of attention;
            `all-linear`: every linear layer.
        rslora: Whether s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        seed: The run's seed; A is drawn from a stream of its own.
        name: Name or folder of the model, which the adapter's folder mentions.

    Raises:
        UserError: `peft` is not installed, or a target is not in the module.

    Example:
        >>> from torch import nn
        >>> from retort.flows.lora import add_lora
        >>> module = nn.ModuleDict({"to_q": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
        >>> adapter = add_lora(module, rank=1, alpha=2.0)
        >>> [(name, tuple(own.shape)) for name, own in module.named_parameters() if own.requires_grad]
        [('to_q.lora_A.default.weight', (1, 2)), ('to_q.lora_B.default.weight', (2, 1))]
    """
    need_peft()
    settings = {"rank": rank, "alpha": alpha, "targets": list(targets), "rslora": rslora}
    return put_in(module, _chosen(module, targets), settings, name=name, seed=seed)


def _chosen(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """The whole names of the layers that targets name."""
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    chosen = dict[str, None]()
    for target in targets:
        ends = PROJECTIONS if target == ATTENTION else (target,)
        found = [
            name
            for name in linear
            if target == ALL_LINEAR or any(name == end or name.endswith(f".{end}") for end in ends)
        ]
        if not found:
            short = sorted({name.rpartition(".")[2] for name in linear} - {ATTENTION})
            if target == ATTENTION:
                raise UserError(
                    "lora.targets: the model has no projections of attention; set lora.targets=all-linear, or name "
                    f"some of its linear layers: {', '.join(short[:20])}"
                )
            known = did_you_mean(target, [*short, ATTENTION, ALL_LINEAR])
            raise UserError(f"lora.targets: the model has no linear layer '{target}'; {known}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def adapter_in(module: nn.Module) -> Adapter | None:
    """The adapter that is in a module; None where there is none."""
    if not any(name.endswith("base_layer") for name, _ in module.named_modules()):
        return None
    return Adapter(module, None, {})


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by the names that it has without an adapter; one that is in it is merged into a copy.

    Args:
        module: `VelocityModel.module`; it is not changed.
    """
    found = adapter_in(module)
    return dict(module.state_dict()) if found is None else found.merged()


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Saves an adapter by itself, as `PeftModel.from_pretrained` and as `load_lora_weights` of diffusers open it.

    Args:
        adapter: What `add_lora` returned.
        folder: An empty folder.
    """
    from safetensors.torch import load_file, save_file

    adapter.save(folder)
    config = read_object(folder / CONFIG)
    settings = json.dumps({f"{_TRANSFORMER}{name}": value for name, value in config.items()}, sort_keys=True)
    tensors = {
        f"{_TRANSFORMER}{name.removeprefix(_PREFIX)}": tensor for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt", "lora_adapter_metadata": settings})


def read_factors(label: str, folder: Path) -> dict[str, LowRank]:
    """Reads the factors of an adapter's folder, fp32, by the names of their layers.

    Args:
        label: What messages call it.
        folder: As `peft` writes it: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: It cannot be read, or the adapter is more than a pair of factors for each of some linear layers.
    """
    settings = read_settings(label, folder)
    for name, allowed in _PLAIN.items():
        if settings.get(name) not in allowed:
            raise UserError(
                f"{label}: {CONFIG}: {name} is {quoted(settings.get(name), 60)}, and only plain LoRA adapters are "
                "read; merge this one into its base by the library that made it"
            )
    tensors = _tensors(label, folder)
    layers = sorted({name.removesuffix(_DOWN).removesuffix(_UP) for name in tensors})
    found = dict[str, LowRank]()
    for name in layers:
        down, up = tensors.get(name + _DOWN), tensors.get(name + _UP)
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or not 0 < len(down) == up.shape[1]:
            raise UserError(f"{label}: {WEIGHTS}: {name} has no two factors that fit; copy the adapter again")
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise UserError(f"{label}: {WEIGHTS}: {name} holds NaN or infinity; that adapter is broken")
        found[name.removeprefix(_PREFIX)] = LowRank(down, up, _scaling(label, settings, len(down)))
    return found


def read_settings(label: str, folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder.

    Raises:
        UserError: They cannot be read.
    """
    try:
        return read_object(folder / CONFIG)
    except UserError as error:
        raise UserError(f"{label}: {error}; copy the adapter again") from None


def _scaling(label: str, settings: Mapping[str, Any], rank: int) -> float:
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MOST_ALPHA:
        most = f"it must be a number, at most {_MOST_ALPHA:g}"
        raise UserError(f"{label}: {CONFIG}: lora_alpha is {quoted(alpha, 60)}; {most}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)


def _tensors(label: str, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        pickled = f"; {PICKLED} is pickled, and unpickling can run code" if (folder / PICKLED).is_file() else ""
        raise UserError(f"{label}: no {WEIGHTS} in that folder{pickled}; save the adapter as safetensors")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{label}: {WEIGHTS} cannot be read: {reason(error)}; copy the adapter again") from None
    others = sorted(name for name in tensors if not name.endswith((_DOWN, _UP)))
    if others or not tensors:
        what = f"holds {quoted(others[0])}" if others else "is empty"
        raise UserError(f"{label}: {WEIGHTS} {what}; only the factors A and B of linear layers are read")
    return {name: tensor.float() for name, tensor in tensors.items()}


@torch.no_grad()
def add_product(module: nn.Module, factors: Mapping[str, LowRank], label: str) -> None:
    """Adds s B A to the weights of layers, in place.

    Args:
        module: The module; a layer that has an adapter gets it in the weight beneath.
        factors: By the names of layers.
        label: What messages call the adapter.

    Raises:
        UserError: A layer is not in the module, or of another shape: the adapter is of another base. Nothing changes.
    """
    weights = {name: weight_of(module, name, factor, label) for name, factor in factors.items()}
    for name, factor in factors.items():
        weight = weights[name]
        kind = torch.promote_types(weight.dtype, torch.float32)
        down, up = (x.to(weight.device, kind) for x in (factor.down_QD, factor.up_VQ))
        weight.copy_(weight.to(kind) + factor.scaling * (up @ down))


def weight_of(module: nn.Module, name: str, factor: LowRank, label: str) -> Tensor:
    """The weight that a pair of factors is for.

    Raises:
        UserError: There is none of that name and shape.
    """
    try:
        layer: Any = module.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{label}: the base has no layer '{name}', which the adapter is for; name the base that it was trained over"
        ) from None
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    shape = (len(factor.up_VQ), factor.down_QD.shape[1])
    if not isinstance(weight, Tensor) or weight.shape != shape:
        there = "no weight" if not isinstance(weight, Tensor) else f"a weight {tuple(weight.shape)}"
        raise UserError(
            f"{label}: layer '{name}' of the base has {there}, and the adapter is for {shape}; name the base that it "
            "was trained over"
        )
    return weight


def words(factors: Mapping[str, LowRank]) -> str:
    """Rank and layers of an adapter, for messages."""
    ranks = sorted({len(factor.down_QD) for factor in factors.values()})
    return f"rank {'/'.join(map(str, ranks))} on {counted(len(factors), 'layer')}"
