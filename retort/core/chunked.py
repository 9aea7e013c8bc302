"""The walk of the loss core over chunks and blocks, and the two ways to form its gradient. Axes: `retort.core`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from retort.core.definition import Core
from retort.core.head import Products
from retort.core.signals import TeacherSignal, as_compute

#: Elements of one chunk of logits, 160 MB in fp32. At a vocabulary of 150,000 that is some 260 steps; in smaller chunks
#: reading the head takes as long as multiplying by it.
CHUNK_ELEMENTS = 40_000_000
#: Elements of a block on a CPU, 2 MB in fp32. What autograd keeps of a block then stays in the CPU's cache.
BLOCK_ELEMENTS = 2**19


def cuts(size: int, part: int, begins_N: Tensor | None = None) -> list[slice]:
    """Cuts `size` elements into neighbouring slices of at most `part`.

    With `begins_N`, a slice begins only where that is true, and is longer than `part` where no shorter one is possible.
    """
    if begins_N is None:
        return [slice(start, min(start + part, size)) for start in range(0, size, part)]
    places: list[int] = begins_N.nonzero().squeeze(-1).tolist()  # pyright: ignore
    places.append(size)
    found: list[slice] = []
    start = 0
    while start < size:
        index = bisect_right(places, min(start + part, size)) - 1
        if index < 0 or places[index] <= start:
            index += 1
        found.append(slice(start, places[index]))
        start = places[index]
    return found


def begins(signals: Iterable[TeacherSignal]) -> Tensor | None:
    """The steps at which all signals may be cut, bool [N]; None: everywhere."""
    found = [begins_N for signal in signals if (begins_N := signal.begins_N) is not None]
    return torch.stack(found).all(0) if found else None


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Steps of a chunk. A GPU takes four times as many, because its products are faster on larger matrices."""
    return max(1, CHUNK_ELEMENTS * (4 if device.type == "cuda" else 1) // vocab)


def block_rows(vocab: int, device: torch.device) -> int:
    """Steps of a block. A GPU gains nothing from small blocks, so there a block is a chunk."""
    return chunk_rows(vocab, device) if device.type == "cuda" else max(1, BLOCK_ELEMENTS // vocab)


def blocks(core: Core, size: int, device: torch.device, begins_N: Tensor | None) -> list[slice]:
    """Cuts a chunk of `size` steps into blocks; a sharded vocabulary has one, as ranks exchange numbers per block."""
    spread = core.head is not None and core.head.shard.spread
    return cuts(size, size if spread else block_rows(core.widest, device), begins_N)


@cache
def keep_freed_blocks() -> None:
    """Has the allocator of a process keep what a block frees, for the next block.

    glibc returns the end of its heap to the system once more than a little of it is free, and every block would fetch
    its memory page by page again, which took longer than to compute on it. Its limit follows the largest piece that
    was mapped and freed, up to 32 MiB, so one piece is made and freed, without touching its memory: see mallopt(3),
    M_MMAP_THRESHOLD. Other allocators do not mind.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


@dataclass(eq=False)
class Pass:
    """The work of `Chunked`, forward and backward.

    Attributes:
        core: The function that is evaluated.
        loss: (values of some steps, their slice) -> their part of the loss, a scalar; None if there is no loss yet.
        chunk: Steps of a chunk.
        dtype: Dtype of the products.
        names: Names of the values, filled in by the forward pass.
    """

    core: Core
    loss: Callable[[Mapping[str, Tensor], slice], Tensor] | None
    chunk: int
    dtype: torch.dtype
    names: list[str] = field(default_factory=lambda: [])

    def values(self, hidden_ND: Tensor, learns: bool) -> tuple[Tensor, dict[str, Tensor], set[str]]:
        """Returns the loss, all values, and the names of the values that depend on the student."""
        products = self._products((False,) * 5, once=False)
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        all_values: dict[str, Tensor] = {}
        live: set[str] = set()
        for rows in self._chunks():
            chunk = Chunk(self.core, rows, *products.forward(hidden_ND[rows]))
            for span, values in chunk.values():
                if self.loss is not None:
                    total += self.loss(values, span)
                _keep(all_values, values, span, self.core.count)
            if learns and not live:
                live = chunk.live()
            del chunk  # before the next one is made
        return total, all_values, live

    def gradients(
        self, hidden_ND: Tensor, needed: tuple[bool, ...], scalar: Callable[[dict[str, Tensor], slice], Tensor | None]
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Returns all values, and the gradients of a scalar with respect to hidden states and head."""
        chunks = self._chunks()
        products = self._products(needed, once=len(chunks) == 1)
        held_NV = products.held(self.core.count, self.chunk)
        all_values: dict[str, Tensor] = {}
        hidden: dict[str, Tensor] = {}

        def carry(gradient_CV: Tensor, rows: slice) -> None:
            of_hidden_CD = products.backward(gradient_CV, hidden_ND[rows])
            if of_hidden_CD is not None:
                _keep(hidden, {"hidden": of_hidden_CD.to(hidden_ND.dtype)}, rows, self.core.count)

        for rows in chunks:
            target_CV = None if held_NV is None else held_NV[rows]
            chunk = Chunk(self.core, rows, *products.forward(hidden_ND[rows]), target_CV)
            for span, values in chunk.backward(scalar):
                _keep(all_values, values, span, self.core.count)
                del values  # this also frees the block's graph, which holds the chunk's logits
            gradient_CV = chunk.gradient_CV
            del chunk  # and the teacher's logits with it, before a gradient of the head is made
            if held_NV is None:
                carry(gradient_CV, rows)
            del gradient_CV  # before the next one is made
        if held_NV is not None:
            carry(held_NV, slice(0, self.core.count))
            del held_NV
        of_hidden_ND = hidden.get("hidden")
        if of_hidden_ND is not None and self.core.head is not None:
            of_hidden_ND = self.core.head.shard.sum(of_hidden_ND)
        return all_values, [of_hidden_ND, *products.gradients()]

    def _chunks(self) -> list[slice]:
        return cuts(self.core.count, self.chunk, begins(self.core.signals.values()))

    def _products(self, needed: tuple[bool, ...], *, once: bool) -> Products:
        assert self.core.head is not None
        return Products(self.core.head, self.core.vocab, self.dtype, needed, once=once)


class Chunk:
    """A chunk's logits, cut into blocks."""

    def __init__(
        self,
        core: Core,
        rows: slice,
        product_CV: Tensor,
        rest_CV: Tensor | None = None,
        gradient_CV: Tensor | None = None,
    ) -> None:
        """Takes the steps `rows` of a core, the product of their hidden states with the head, and its rounding error.

        The product is `product_CV + rest_CV` where there is a rest (`Products.forward`). Gradients of the logits go to
        `gradient_CV`; None: they overwrite the product.
        """
        self.core, self.rows, self.product_CV, self.rest_CV = core, rows, product_CV, rest_CV
        self.gradient_CV = product_CV if gradient_CV is None else gradient_CV
        self.steps = core.steps.select(rows)
        self.signals = {name: signal.precomputed(rows, core.vocab) for name, signal in core.signals.items()}
        self.begins_C = begins(self.signals.values())
        self.cuts = blocks(core, rows.stop - rows.start, product_CV.device, self.begins_C)

    def values(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yields each block's slice of N and its values."""
        for cut in self.cuts:
            yield self._span(cut), self.core.evaluate(self._product(cut), self.steps, self.signals, cut)

    def live(self) -> set[str]:
        """Names of the values that have a gradient, found on one step or unit."""
        values = self._evaluate(cuts(self.rows.stop - self.rows.start, 1, self.begins_C)[0])[1]
        return {name for name, value in values.items() if value.requires_grad}

    def backward(
        self, scalar: Callable[[dict[str, Tensor], slice], Tensor | None]
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yields the same, and leaves the gradient of each block's scalar in `gradient_CV`."""
        for cut in self.cuts:
            leaf_CV, values = self._evaluate(cut)
            with torch.enable_grad():
                total = scalar(values, self._span(cut))
            if total is None or not total.requires_grad:
                self.gradient_CV[cut] = 0.0
            else:
                self.gradient_CV[cut] = torch.autograd.grad(total, leaf_CV)[0]
            yield self._span(cut), values
            del values, leaf_CV, total

    def _evaluate(self, cut: slice) -> tuple[Tensor, dict[str, Tensor]]:
        leaf_CV = self._product(cut).detach().requires_grad_()
        with torch.enable_grad():
            return leaf_CV, self.core.evaluate(leaf_CV, self.steps, self.signals, cut)

    def _product(self, cut: slice) -> Tensor:
        product_CV = as_compute(self.product_CV[cut])
        return product_CV if self.rest_CV is None else product_CV.add_(self.rest_CV[cut])

    def _span(self, cut: slice) -> slice:
        return slice(self.rows.start + cut.start, self.rows.start + cut.stop)


class Chunked(torch.autograd.Function):
    """Loss and values from hidden states and head."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, hidden_ND: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pass_, ctx.gradients = pass_, None
        needed = tuple(bool(flag) for flag in ctx.needs_input_grad[1:])
        keep_freed_blocks()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if pass_.loss is not None and any(needed):
                total, values, ctx.gradients, live = _at_once(pass_, hidden_ND, needed)
            else:
                total, values, live = pass_.values(hidden_ND, any(needed))
        pass_.names.extend(values)
        still = [values_N for name, values_N in values.items() if name not in live]
        ctx.mark_non_differentiable(*still, *([total] if pass_.loss is None else []))
        if any(needed):
            ctx.save_for_backward(hidden_ND, *parts)
        return total, *values.values()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients: list[Tensor | None] = [None] * 5
        of_loss, of_values = upstream[0], upstream[1:]
        if of_loss is not None and ctx.gradients is not None:
            gradients = [None if part is None else _times(part, of_loss) for part in ctx.gradients]
            ctx.gradients = None
        wanted = {name: u for name, u in zip(ctx.pass_.names, of_values, strict=True) if u is not None}
        if wanted:
            hidden_ND = ctx.saved_tensors[0]
            needed = tuple(bool(flag) for flag in ctx.needs_input_grad[1:])
            with torch.autocast(hidden_ND.device.type, enabled=False), torch.no_grad():
                again = _again(ctx.pass_, hidden_ND, wanted, needed)
            gradients = [a if b is None else b if a is None else a + b for a, b in zip(gradients, again, strict=True)]
        return (None, *gradients)


def _at_once(
    pass_: Pass, hidden_ND: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None], set[str]]:
    """Returns loss, values, the loss's gradients, and the names of the values that depend on the student."""
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    live: set[str] = set()

    def scalar(values: dict[str, Tensor], span: slice) -> Tensor:
        assert pass_.loss is not None
        live.update(name for name, value in values.items() if value.requires_grad)
        part = pass_.loss(values, span)
        total.add_(part.detach())
        return part

    values, gradients = pass_.gradients(hidden_ND, needed, scalar)
    return total, values, gradients, live


def _again(
    pass_: Pass, hidden_ND: Tensor, wanted: Mapping[str, Tensor], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Returns the gradients of hidden states and head, given the gradients of the values."""

    def scalar(values: dict[str, Tensor], span: slice) -> Tensor | None:
        parts = [(values[name] * u[span]).sum() for name, u in wanted.items() if values[name].requires_grad]
        return torch.stack(parts).sum() if parts else None

    return pass_.gradients(hidden_ND, needed, scalar)[1]


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiplies in place; a factor of 1, the usual one, is not worth a pass over the head's gradient."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    return gradient.mul_(upstream.to(gradient.dtype))


def _keep(all_values: dict[str, Tensor], values: Mapping[str, Tensor], rows: slice, count: int) -> None:
    """Stores the values of some of `count` steps.

    Each value goes into one tensor that is allocated beforehand. Thousands of small tensors that outlive the blocks
    between which they were allocated would fragment the heap until no block fits.
    """
    for name, values_C in values.items():
        if name not in all_values:
            all_values[name] = values_C.new_empty((count, *values_C.shape[1:]))
        all_values[name][rows] = values_C.detach()
