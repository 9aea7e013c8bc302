"""The output head: from hidden states to logits, and the products behind it. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from retort.core.distribution import WHOLE, Shard

#: Least number of elements of a weight whose fp32 products on a CPU go through oneDNN.
ONEDNN_ELEMENTS = 2**22
#: Elements of a part's gradient that are added at once, where the products are narrower than their sum.
SLAB_ELEMENTS = 2**22
#: Elements of one piece of such a sum, 64 MiB in fp32. Allocators give pieces of that size back to the system.
PIECE_ELEMENTS = 2**24


def linear(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN for a large fp32 weight on a CPU where no gradient is needed.

    PyTorch sends fp32 to its BLAS and other dtypes to oneDNN. On the processors measured, oneDNN multiplies a head in
    0.5 to 0.98 of the time (see docs/performance.md). It does not speed up the other two products of a head.
    """
    onednn = (
        weight_VD.dtype == hidden_CD.dtype == torch.float32
        and weight_VD.device.type == "cpu"
        and weight_VD.numel() >= ONEDNN_ELEMENTS
        and len(hidden_CD) > 1
        and not (torch.is_grad_enabled() and (hidden_CD.requires_grad or weight_VD.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if not onednn:
        return functional.linear(hidden_CD, weight_VD, bias_V)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_CD, weight_VD, bias_V, "none", [], "")
    return product


def rounds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype come out rounded to fewer bits than fp32, and a second product gives the rest."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter on a head: logits gain `scaling * up (down hidden)`. Q is the rank.

    Attributes:
        down_QD, up_VQ: Its two factors.
        scaling: Factor of the product.
    """

    down_QD: Tensor
    up_VQ: Tensor
    scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Head:
    """The output head, which turns hidden states into logits.

    Attributes:
        weight_VD: One row per id; rows at or beyond the shared vocabulary are padding and get no probability.
        bias_V: Optional bias.
        scale: Factor of the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        soft_cap: Logits become cap * tanh(logits / cap) (Gemma).
        adapter: Optional low-rank adapter on the weight.
        shard: The ids of the rows, where they are spread over ranks (`retort.core.shard.VocabShard`).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    adapter: LowRank | None = None
    shard: Shard = WHOLE

    @property
    def width(self) -> int:
        """V, padding included; on a rank that holds only some of the ids, the number that it holds."""
        return self.weight_VD.shape[0]

    def logits(self, hidden_CD: Tensor, vocab: int | None = None) -> Tensor:
        """Logits [C, V] of the first `vocab` ids, in the dtype of the product, differentiable. The definition."""
        bias_V, rows = self.bias_V, slice(None) if vocab is None else slice(vocab)
        logits_CV = linear(hidden_CD, self.weight_VD[rows], None if bias_V is None else bias_V[rows])
        if self.adapter is not None:
            low_CQ = functional.linear(hidden_CD, self.adapter.down_QD)
            logits_CV = logits_CV + functional.linear(low_CQ, self.adapter.up_VQ[rows]) * self.adapter.scaling
        return self.shape(logits_CV)

    def shape(self, product_CV: Tensor) -> Tensor:
        """Applies the model family's scale and soft-cap to the product."""
        if self.scale != 1.0:
            product_CV = product_CV * self.scale
        if self.soft_cap is not None:
            product_CV = torch.tanh(product_CV / self.soft_cap) * self.soft_cap
        return product_CV

    def each(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same with other parts."""
        weight_VD, bias_V, down_QD, up_VQ = (None if part is None else change(part) for part in self.parts)
        assert weight_VD is not None
        adapter = self.adapter
        if adapter is not None and down_QD is not None and up_VQ is not None:
            adapter = replace(adapter, down_QD=down_QD, up_VQ=up_VQ)
        return replace(self, weight_VD=weight_VD, bias_V=bias_V, adapter=adapter)

    def rows(self, ids: slice | Tensor) -> Head:
        """The head of some ids only, in the order given."""
        adapter, bias_V = self.adapter, self.bias_V
        if adapter is not None:
            adapter = replace(adapter, up_VQ=adapter.up_VQ[ids])
        return replace(
            self, weight_VD=self.weight_VD[ids], bias_V=None if bias_V is None else bias_V[ids], adapter=adapter
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """All parts that can learn: weight, bias, and the adapter's two factors."""
        down, up = (None, None) if self.adapter is None else (self.adapter.down_QD, self.adapter.up_VQ)
        return self.weight_VD, self.bias_V, down, up


class Products:
    """The products of one head with many chunks of hidden states, forward and backward, without autograd.

    Autograd would allocate a gradient of the whole head for every chunk, and keep every chunk's logits for the backward
    pass. Here a chunk's logits are overwritten by their own gradient, and the head's gradient is one buffer.
    """

    def __init__(
        self, head: Head, vocab: int, dtype: torch.dtype, needed: tuple[bool, ...], *, once: bool = False
    ) -> None:
        """Prepares products of the first `vocab` rows, computed in `dtype`.

        Args:
            head: The head; its parts are read, not changed.
            vocab: Number of rows that count.
            dtype: Dtype of the products; parts are cast to it once.
            needed: Which gradients to compute: hidden states, weight, bias, the adapter's down, its up.
            once: Whether there is a single chunk, so that no gradient is a sum over chunks.
        """
        weight, bias, down, up = (None if part is None else part.detach() for part in head.parts)
        assert weight is not None
        self.weight_VD = weight[:vocab].to(dtype)
        self.bias_V = None if bias is None else bias[:vocab].to(dtype)
        self.down_QD = None if down is None else down.to(dtype)
        self.up_VQ = None if up is None else up[:vocab].to(dtype)
        self.scaling = 1.0 if head.adapter is None else head.adapter.scaling
        self.needed = needed
        self.dtype = dtype
        self._once = once
        self._shapes = [None if part is None else (part.shape, part.dtype) for part in head.parts]
        self._vocab = vocab
        self._sums: dict[int, list[Tensor]] = {}

    def forward(self, hidden_CD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product [C, V], before the family's scale and soft-cap, and what is missing from it, if anything is.

        Where a CPU computes in fewer bits than fp32, a product is rounded once it is summed, and softmaxes of rounded
        logits are where most of the error of a gradient comes from. PyTorch has no product there with a wider result.
        So the product is computed once more, less its rounded value, which is subtracted before the rounding. The sum
        of both has twice the digits.
        """
        hidden_CD = hidden_CD.to(self.dtype)
        if not rounds(self.dtype, hidden_CD.device):
            product_CV = linear(hidden_CD, self.weight_VD, self.bias_V)
            self._adapt(product_CV, hidden_CD)
            return product_CV, None
        product_CV = hidden_CD @ self.weight_VD.t()
        rest_CV = torch.addmm(product_CV, hidden_CD, self.weight_VD.t(), beta=-1)
        if self.bias_V is not None:
            rest_CV += self.bias_V
        self._adapt(rest_CV, hidden_CD)
        return product_CV, rest_CV

    def held(self, steps: int, chunk: int) -> Tensor | None:
        """Memory for the gradients of all logits [N, V], where that is cheaper than a sum over chunks; else None.

        A head's gradient in fewer bits than fp32 is summed in fp32 over several chunks, and rounded in the end. Where
        the gradients of all logits take no more memory than such a sum, and both together no more than it and a chunk,
        one product makes it at once.

        Args:
            steps: N.
            chunk: Steps of a chunk.
        """
        shape = self._shapes[0]
        assert shape is not None
        size, width = self.dtype.itemsize, shape[0][1]
        room = min(4 * width, (4 - size) * width + 4 * chunk)  # bytes for each id
        if not self.needed[1] or shape[1] != self.dtype or size >= 4 or steps <= chunk or steps * size > room:
            return None
        self._once = True
        return torch.empty((steps, self._vocab), dtype=self.dtype, device=self.weight_VD.device)

    def _adapt(self, product_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds the adapter's part in place."""
        if self.down_QD is not None and self.up_VQ is not None:
            product_CV.addmm_(hidden_CD @ self.down_QD.t(), self.up_VQ.t(), alpha=self.scaling)

    def backward(self, gradient_CV: Tensor, hidden_CD: Tensor) -> Tensor | None:
        """Adds to the gradients of the parts; returns the gradient of the hidden states, if it is needed."""
        hidden_CD = hidden_CD.to(self.dtype)
        if self.needed[1]:
            self._add(0, gradient_CV.t(), hidden_CD)
        if self.needed[2]:
            self._add(1, gradient_CV.t(), torch.ones_like(gradient_CV[:, :1]))
        low_CQ = None
        if self.down_QD is not None and self.up_VQ is not None:
            low_CQ = (gradient_CV @ self.up_VQ) * self.scaling
            if self.needed[3]:
                self._add(2, low_CQ.t(), hidden_CD)
            if self.needed[4]:
                self._add(3, gradient_CV.t(), (hidden_CD @ self.down_QD.t()) * self.scaling)
        if not self.needed[0]:
            return None
        found_CD = gradient_CV @ self.weight_VD
        if low_CQ is not None and self.down_QD is not None:
            found_CD.addmm_(low_CQ, self.down_QD)
        return found_CD

    def _add(self, part: int, left: Tensor, right: Tensor) -> None:
        """Adds the product of two matrices to the sum of a part, in fp32 or better if there are several chunks."""
        first = part not in self._sums
        if first:
            self._sums[part] = self._new_sum(part, left.shape[0], right)
        pieces = self._sums[part]
        for total, rows in zip(pieces, _cut(left, len(pieces[0])), strict=False):
            _accumulate(total[: len(rows)], rows, right, first=first)

    def _new_sum(self, part: int, rows: int, right: Tensor) -> list[Tensor]:
        """Memory for a part's gradient, one piece if that is its dtype; rows that no product reaches are 0."""
        shape = self._shapes[part]
        assert shape is not None
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self._once and shape[1] == self.dtype:
            exact = self.dtype
        whole, width = shape[0][0], right.shape[1]
        piece = whole if exact == shape[1] else max(1, PIECE_ELEMENTS // width)
        sizes = [min(piece, whole - start) for start in range(0, whole, piece)]
        pieces = [torch.empty((size, width), dtype=exact, device=right.device) for size in sizes]
        for start, total in zip(range(0, whole, piece), pieces, strict=True):
            total[max(0, rows - start) :].zero_()
        return pieces

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of weight, bias, down and up, each in the dtype of its part; None where it is not needed."""
        found: list[Tensor | None] = []
        for part, shape in enumerate(self._shapes):
            pieces = self._sums.pop(part, None)
            if shape is None or not self.needed[part + 1]:
                found.append(None)
            elif pieces is None:  # there were no steps
                found.append(torch.zeros(shape[0], dtype=shape[1], device=self.weight_VD.device))
            else:
                found.append(_joined(pieces, shape[1]).reshape(shape[0]))
        return tuple(found)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Adds a product to a sum, or writes it there. A whole product that is narrower would need half of the sum."""
    if left.dtype == total.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    slab = max(1, SLAB_ELEMENTS // right.shape[1])
    for into, rows in zip(_cut(total, slab), _cut(left, slab), strict=True):
        if first:
            into.copy_(rows @ right)
        else:
            into += rows @ right


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    """Views of neighbouring rows, `size` of them each but the last."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _joined(pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Pieces as one tensor of a dtype; each is let go once it is copied, so that no sum stands beside its copy."""
    if len(pieces) == 1:
        return pieces.pop().to(dtype)
    whole = pieces[0].new_empty((sum(map(len, pieces)), *pieces[0].shape[1:]), dtype=dtype)
    for into in _cut(whole, len(pieces[0])):
        into.copy_(pieces.pop(0))
    return whole
