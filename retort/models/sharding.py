"""Weights spread over ranks by FSDP2. Each rank keeps a slice of every parameter of the student, and of what learns.

Learning gathers a layer when its turn comes and sums gradients into the slices, in lock step: all ranks make the same
number of passes. Whatever needs no gradient (writing, scoring, judging) runs with the whole weights on every rank,
gathered once (`Sharding.whole`), so that each may make as many passes as it has work for.

Of a frozen model only the layers are spread, where the settings ask for it: a teacher's signals read its head after
the pass. It scores in lock step, too. Axes: see `retort.core`.
"""

# pyright: basic
from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from retort.errors import UserError
from retort.ranks import ONE, World


class Sharding:
    """How one model's weights are spread; shared by all who share the weights. Until `spread` they are whole."""

    def __init__(self) -> None:
        """Nothing is spread yet."""
        self._modules: list[Any] = []
        self._root: Any = None
        self._tied: tuple[Module, Module] | None = None
        self._entered = 0
        self._world: World = ONE
        self._only_layers = False
        self._apart: list[Parameter] = []

    @property
    def on(self) -> bool:
        """Whether the weights are spread."""
        return bool(self._modules)

    @property
    def spreads_head(self) -> bool:
        """Whether the head is among the weights that are spread."""
        return self.on and not self._only_layers

    @property
    def by_layer(self) -> bool:
        """Whether passes gather layer by layer now."""
        return self.on and not self._entered

    @property
    def in_step(self) -> bool:
        """Whether a frozen model's passes gather layer by layer now, so that all ranks have to make equally many."""
        return self._only_layers and self.by_layer

    def spare(self, passes: int) -> int:
        """How many more passes the busiest rank makes with a frozen model than this one; 0 where none waits."""
        return max(self._world.each(lambda: passes)) - passes if self.in_step else 0

    def spread(self, model: Any, world: World, name: str, apart: Sequence[Parameter] = ()) -> None:
        """Spreads a model's weights over all ranks; optimizers and lists of its parameters are to be made anew.

        Args:
            model: Of transformers; changed in place.
            world: The ranks.
            name: Of the model, for messages.
            apart: Parameters that stay whole on every rank, because ranks use them differently often (a vision tower).

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
        for layer in layers_of(model, apart):
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh, ignored_params=set(apart) or None)
        self._apart, self._world = list(apart), world
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

    def spread_layers(self, model: Any, world: World, name: str, apart: Sequence[Parameter] = ()) -> None:
        """Spreads the layers of a frozen model over all ranks; its embedding, head and the rest stay whole on each.

        Args:
            model: Of transformers; changed in place.
            world: The ranks.
            name: Of the model, for messages.
            apart: See `spread`.

        Raises:
            UserError: A family that does not say what its layers are, or whose layers share parameters.
        """
        if world.size == 1 or self.on:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layers = layers_of(model, apart)
        why = _no_layers(model, layers)
        if why:
            raise UserError(
                f"{name}: {type(model).__name__} {why}, so ranks cannot share its layers; leave out "
                "ranks.teacher = sharded"
            )
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
        mesh = init_device_mesh(model.device.type, (world.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The base model has nothing of its own to exchange; it tells layers which of them comes next.
        fully_shard(model.base_model, mesh=mesh, ignored_params=outside)
        self._modules, self._world, self._only_layers = list(layers), world, True

    def sum_gradients(self) -> None:
        """Sums, over all ranks, the gradients of what is whole on each; those of slices are summed already.

        A parameter that no rank used has none, as in a single process: an optimizer would let it decay.
        """
        from torch import distributed

        learning = [own for own in self._apart if own.requires_grad]
        if not learning:
            return
        given = [own.new_zeros(own.shape) if own.grad is None else own.grad for own in learning]
        used = given[0].new_tensor([float(own.grad is not None) for own in learning])
        flat = torch.cat([used, *(gradient.flatten() for gradient in given)])
        distributed.all_reduce(flat)
        used, *parts = flat.split([len(learning), *(own.numel() for own in learning)])
        for own, part, ranks in zip(learning, parts, used.tolist(), strict=True):
            own.grad = part.view(own.shape).clone() if ranks else None

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

    @contextlib.contextmanager
    def whole_state(self, model: Any) -> Iterator[dict[str, Tensor]]:
        """Within, the model's whole state by name, of which nothing is a copy; all ranks enter it together."""
        names = list(model.state_dict())  # FSDP2 puts the slices back whenever this is asked for, so not inside
        with self.whole():
            own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
            yield {name: own[name].detach() for name in names}

    def _tie(self) -> None:
        if self._tied is not None:
            embedding, head = self._tied
            head._parameters["weight"] = embedding._parameters["weight"]


def layers_of(model: Any, apart: Sequence[Parameter] = ()) -> list[Module]:
    """The blocks that a family says are not to be split, spread or not; without those that hold what is apart."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.base_model.modules() if kinds & {kind.__name__ for kind in type(m).__mro__}]
    inside = {id(module) for outer in found for module in outer.modules() if module is not outer}
    left_out = {id(own) for own in apart}
    alone = [module for module in found if not any(id(p) in left_out for p in module.parameters())]
    return [module for module in alone if id(module) not in inside]


def _no_layers(model: Any, layers: Sequence[Module]) -> str | None:
    """Why a model's layers cannot be spread one by one; None if they can."""
    if not layers:
        return "does not say which of its modules are layers"
    inside = {id(module) for layer in layers for module in layer.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    owners = [{id(p) for p in layer.parameters()} for layer in layers]
    owners.append({id(p) for module in rest for p in module.parameters(recurse=False)})
    several = sum(map(len, owners)) > len(set().union(*owners))
    return "has layers that share parameters" if several else None


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank keeps a slice; any other tensor as it is. All ranks call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip(parameters: Sequence[Parameter], limit: float) -> float:
    """Scales gradients down to a total norm, and returns the norm before. Some may be slices, others whole.

    Args:
        parameters: The parameters that learn.
        limit: The largest norm.
    """
    kinds = of_one_kind(parameters)
    if len(kinds) == 1:
        return float(full(torch.nn.utils.clip_grad_norm_(parameters, limit)))
    gradients = [[own.grad for own in kind if own.grad is not None] for kind in kinds]
    norm = math.hypot(*(float(full(torch.nn.utils.get_total_norm(own))) for own in gradients))
    if math.isfinite(norm):
        for gradient in itertools.chain(*gradients):
            slice_of(gradient).mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def of_one_kind(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Parameters that are whole on this rank, and those of which it keeps a slice: few functions take both at once."""
    from torch.distributed.tensor import DTensor

    slices: list[Parameter] = [own for own in parameters if isinstance(own, DTensor)]
    whole = [own for own in parameters if not isinstance(own, DTensor)]
    return [kind for kind in (slices, whole) if kind]


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
