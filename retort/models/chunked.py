"""How the loss core walks over chunks and blocks, and the two ways its gradient is formed. Axes: `retort.types`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.models.head import Products
from retort.signals import as_compute

if TYPE_CHECKING:
    from retort.models.core import Core


@dataclass(eq=False)
class Pass:
    """The work of `Chunked`, forward and backward."""

    core: Core
    loss: Callable[..., Tensor] | None
    chunk: int
    dtype: torch.dtype
    names: list[str]

    def chunks(self, products: Products, hidden_ND: Tensor) -> Iterator[Chunk]:
        """Chunks of the steps, each with its product."""
        for start in range(0, self.core.count, self.chunk):
            rows = slice(start, min(start + self.chunk, self.core.count))
            yield Chunk(self.core, rows, products.forward(hidden_ND[rows]))

    def products(self, needed: tuple[bool, ...]) -> Products:
        head = self.core.head
        assert head is not None
        return Products(head, self.core.vocab, self.dtype, needed)


class Chunk:
    """A chunk's logits, cut into blocks."""

    def __init__(self, core: Core, rows: slice, product_CV: Tensor) -> None:
        self.core, self.rows, self.product_CV = core, rows, product_CV
        self.steps = core.steps.rows(rows)
        self.signals = {name: signal.held(rows, core.vocab) for name, signal in core.signals.items()}
        self.cuts = core.blocks(rows.stop - rows.start, product_CV.device)

    def values(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """By block: its place in N, its values."""
        for cut in self.cuts:
            yield self._place(cut), self.core.evaluate(self.product_CV[cut], self.steps, self.signals, cut)

    def backward(
        self, scalar: Callable[[dict[str, Tensor], slice], Tensor | None]
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The same, leaving the gradient of each block's scalar where its product was."""
        for cut in self.cuts:
            leaf_CV = as_compute(self.product_CV[cut]).detach().requires_grad_()
            with torch.enable_grad():
                values = self.core.evaluate(leaf_CV, self.steps, self.signals, cut)
                total = scalar(values, self._place(cut))
            if total is None or not total.requires_grad:
                self.product_CV[cut] = 0.0
            else:
                self.product_CV[cut] = torch.autograd.grad(total, leaf_CV)[0]
            yield self._place(cut), values

    def _place(self, cut: slice) -> slice:
        return slice(self.rows.start + cut.start, self.rows.start + cut.stop)


class Chunked(torch.autograd.Function):
    """Loss and values from hidden states and head."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, hidden_ND: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pass_, ctx.gradients = pass_, None
        needed = tuple(bool(flag) for flag in ctx.needs_input_grad[1:])
        learns = any(needed)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if pass_.loss is not None and learns:
                total, values, ctx.gradients, live = _with_gradient(pass_, hidden_ND, needed)
            else:
                total, values, live = _without(pass_, hidden_ND, learns)
        pass_.names.extend(values)
        still = [values_N for name, values_N in values.items() if name not in live]
        ctx.mark_non_differentiable(*still, *([total] if pass_.loss is None else []))
        if learns:
            ctx.save_for_backward(hidden_ND, *parts)
        return total, *values.values()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found: list[Tensor | None] = [None] * 5
        of_loss, of_values = upstream[0], upstream[1:]
        if of_loss is not None and ctx.gradients is not None:
            found = [None if part is None else _times(part, of_loss) for part in ctx.gradients]
            ctx.gradients = None
        wanted = {name: u for name, u in zip(ctx.pass_.names, of_values, strict=True) if u is not None}
        if wanted:
            hidden_ND = ctx.saved_tensors[0]
            needed = tuple(bool(flag) for flag in ctx.needs_input_grad[1:])
            with torch.autocast(hidden_ND.device.type, enabled=False), torch.no_grad():
                again = _again(ctx.pass_, hidden_ND, wanted, needed)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, again, strict=True)]
        return (None, *found)


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """In place; a factor of 1, the usual one, is not worth a pass over the head's gradient."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    return gradient.mul_(upstream.to(gradient.dtype))


def _without(pass_: Pass, hidden_ND: Tensor, learns: bool) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    """Values alone; and which of them depend on the student."""
    products = pass_.products((False,) * 5)
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    found: dict[str, list[Tensor]] = {}
    live: set[str] = set()
    for chunk in pass_.chunks(products, hidden_ND):
        for place, values in chunk.values():
            if pass_.loss is not None:
                total = total + pass_.loss(values, place)
            _keep(found, values)
        if learns and not live:
            live = _live(chunk)
    return total, {name: torch.cat(parts) for name, parts in found.items()}, live


def _live(chunk: Chunk) -> set[str]:
    """Which values have a gradient, seen on one step."""
    leaf_CV = as_compute(chunk.product_CV[:1]).detach().requires_grad_()
    with torch.enable_grad():
        values = chunk.core.evaluate(leaf_CV, chunk.steps, chunk.signals, slice(0, 1))
    return {name for name, value in values.items() if value.requires_grad}


def _with_gradient(
    pass_: Pass, hidden_ND: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None], set[str]]:
    """Loss, values, and the loss's gradients with respect to hidden states and head."""
    products = pass_.products(needed)
    totals: list[Tensor] = []
    found: dict[str, list[Tensor]] = {}
    live: set[str] = set()

    def scalar(values: dict[str, Tensor], place: slice) -> Tensor:
        assert pass_.loss is not None
        live.update(name for name, value in values.items() if value.requires_grad)
        total = pass_.loss(values, place)
        totals.append(total.detach())
        return total

    hidden: list[Tensor] = []
    for chunk in pass_.chunks(products, hidden_ND):
        for _, values in chunk.backward(scalar):
            _keep(found, values)
        _carry(chunk, products, hidden_ND, hidden)
    gradients = [_joined(hidden, hidden_ND, pass_, needed), *products.gradients()]
    return torch.stack(totals).sum(), {name: torch.cat(parts) for name, parts in found.items()}, gradients, live


def _again(
    pass_: Pass, hidden_ND: Tensor, wanted: Mapping[str, Tensor], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients with respect to hidden states and head, for given gradients of the values."""
    products = pass_.products(needed)

    def scalar(values: dict[str, Tensor], place: slice) -> Tensor | None:
        parts = [(values[name] * u[place]).sum() for name, u in wanted.items() if values[name].requires_grad]
        return torch.stack(parts).sum() if parts else None

    hidden: list[Tensor] = []
    for chunk in pass_.chunks(products, hidden_ND):
        for _ in chunk.backward(scalar):
            pass
        _carry(chunk, products, hidden_ND, hidden)
    return [_joined(hidden, hidden_ND, pass_, needed), *products.gradients()]


def _carry(chunk: Chunk, products: Products, hidden_ND: Tensor, hidden: list[Tensor]) -> None:
    found_CD = products.backward(chunk.product_CV, hidden_ND[chunk.rows])
    if found_CD is not None:
        hidden.append(found_CD.to(hidden_ND.dtype))


def _joined(hidden: list[Tensor], hidden_ND: Tensor, pass_: Pass, needed: tuple[bool, ...]) -> Tensor | None:
    if not needed[0]:
        return None
    assert pass_.core.head is not None
    return pass_.core.head.shard.sum(torch.cat(hidden) if hidden else torch.zeros_like(hidden_ND))


def _keep(found: dict[str, list[Tensor]], values: Mapping[str, Tensor]) -> None:
    for name, values_C in values.items():
        found.setdefault(name, []).append(values_C.detach())
