"""The student's weights spread over ranks by FSDP2: each rank keeps a slice of every parameter, and of all that learns.

Learning gathers a layer when its turn comes and sums gradients into the slices, in lock step: all ranks make the same
number of passes. Whatever needs no gradient (writing, scoring, judging) runs with the whole weights on every rank,
gathered once (`Sharding.whole`), so that each may make as many passes as it has work for. Axes: see `retort.core`.
"""

# pyright: basic
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from retort.errors import UserError
from retort.ranks import World


class Sharding:
    """How one model's weights are spread; shared by all who share the weights. Until `spread` they are whole."""

    def __init__(self) -> None:
        """Nothing is spread yet."""
        self._modules: list[Any] = []
        self._root: Any = None
        self._tied: tuple[Module, Module] | None = None
        self._entered = 0

    @property
    def on(self) -> bool:
        """Whether the weights are spread."""
        return bool(self._modules)

    def spread(self, model: Any, world: World, name: str) -> None:
        """Spreads a model's weights over all ranks; optimizers and lists of its parameters are to be made anew.

        Args:
            model: Of transformers; changed in place.
            world: The ranks.
            name: Of the model, for messages.

        Raises:
            UserError: A family with parameters that lie neither in its base model nor in its head.
        """
        if world.size == 1 or self.on:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(model.device.type, (world.size,))
        base, head, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
        tied = getattr(embedding, "weight", None) is head.weight
        inside = {id(p) for part in (base, head) for p in part.parameters()}
        outside = [own for own, p in model.named_parameters() if id(p) not in inside]
        if outside:
            raise UserError(
                f"{name}: {type(model).__name__} keeps '{outside[0]}' beside its layers and its head, where several "
                "ranks cannot share it; train it in one process"
            )
        for layer in _layers(model, base):
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)
        if tied:
            self._tied = (embedding, head)
            self._tie()
        else:
            fully_shard(head, mesh=mesh)
        self._root = base
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # a loss is divided by what the whole batch counts already
            module.set_force_sum_reduction_for_comms(True)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every rank holds all weights as ordinary tensors, and passes exchange nothing; no gradients.

        All ranks enter it together. It may be entered again inside.
        """
        if not self.on or self._entered:
            yield
            return
        self._entered += 1
        try:
            for module in self._modules:
                module.unshard()
                module.set_reshard_after_forward(False, recurse=False)
            self._tie()
            yield
        finally:
            for module in self._modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self._root, recurse=False)
            self._tie()
            self._entered -= 1

    def part(self, tensor: Tensor) -> Tensor:
        """A part of the head for the loss: gathered, and its gradient summed over ranks into the slices."""
        from torch.distributed.tensor import DTensor, Partial

        if not isinstance(tensor, DTensor):
            return tensor
        learns = tensor.requires_grad and torch.is_grad_enabled()
        return tensor.full_tensor(grad_placements=[Partial()]) if learns else tensor.full_tensor()

    def state(self, model: Any, world: World) -> dict[str, Tensor]:
        """The model's whole state by name, on the CPU of rank 0 and nowhere else; tied weights are one tensor."""
        found = gathered(model.state_dict(), world)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if found and self._tied is not None and parameter is self._tied[0].weight:
                found[name] = next(found[own] for own, p in model.named_parameters() if p is parameter)
        return found

    def _tie(self) -> None:
        if self._tied is not None:
            embedding, head = self._tied
            head._parameters["weight"] = embedding._parameters["weight"]


def _layers(model: Any, base: Any) -> list[Module]:
    """The blocks that a family says are not to be split; without such, the base model is one."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in kinds]
    inside = {id(module) for outer in found for module in outer.modules() if module is not outer}
    return [module for module in found if id(module) not in inside]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank keeps a slice; any other tensor as it is. All ranks call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The whole tensors, one after another: on rank 0 on the CPU, elsewhere dropped. Whole ones stay as they are."""
    if world.size == 1:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if world.leads:
            found[name] = whole.cpu()
    return found


def like(parameter: Parameter | Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, spread as a parameter of its shape is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def bounds(rows: int, ranks: int, rank: int) -> slice:
    """Which rows of a parameter a rank keeps: equal parts, of which the last may be smaller, or hold none."""
    size = -(-rows // ranks)
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def slice_of(tensor: Tensor) -> Tensor:
    """The slice that this rank keeps of a tensor, in the same memory; of any other tensor, all of it."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
