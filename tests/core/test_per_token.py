"""The loss core against its definition, plain autograd on all steps at once, in value and in gradient."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.core import chunked, head
from retort.core.context import Context
from retort.core.head import Head, LowRank
from retort.core.per_token import Core, loss_pass, per_token
from retort.core.signals import Dense, entropy
from retort.core.steps import Clock, Steps
from retort.divergences import jsd_values, kl_values

#: Largest difference allowed from float64, relative to the largest number of the tensor, by the dtype that came in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
#: Relative Frobenius norm of the difference where products are rounded to bf16: these logits are up to 20, so that
#: rounding alone moves them by 0.05.
BF16_ERROR = 1.5e-2


def every_value(context: Context) -> dict[str, Tensor]:
    """All that the core offers a term, through the closed forms."""
    student, rows = context.student, context.signal("teacher")
    teacher = rows.distribution
    ids_NK, top_logp_NK = rows.topk(3)
    own_ids_NK, own_logp_NK = student.topk(3)
    return {
        "reverse": student.reverse_kl(teacher),
        "forward": student.forward_kl(teacher),
        "jsd": student.jsd(teacher, 0.3),
        "entropy": context.student_entropy_N,
        "sampled": context.student_logp_N,
        "top": kl_values(top_logp_NK.log_softmax(-1), student.logp_at(ids_NK)),
        "still": rows.entropy_N + (own_logp_NK - rows.logp_at(own_ids_NK)).sum(-1),
    }


def by_definition(context: Context) -> dict[str, Tensor]:
    """The same from whole log-probs, by autograd."""
    logp_NV, rows = context.student_logp_NV, context.signal("teacher")
    teacher_NV = rows.logp_NV
    top_logp_NK, ids_NK = teacher_NV.topk(3)
    own_logp_NK, own_ids_NK = logp_NV.detach().topk(3)
    return {
        "reverse": kl_values(logp_NV, teacher_NV),
        "forward": kl_values(teacher_NV, logp_NV),
        "jsd": jsd_values(teacher_NV, logp_NV, 0.3),
        "entropy": entropy(logp_NV),
        "sampled": logp_NV.gather(-1, context.steps.tokens_N[:, None]).squeeze(-1),
        "top": kl_values(top_logp_NK.log_softmax(-1), logp_NV.gather(-1, ids_NK)),
        "still": entropy(teacher_NV) + (own_logp_NK - teacher_NV.gather(-1, own_ids_NK)).sum(-1),
    }


class Case:
    """Hidden states, heads and tokens, with fresh leaves for every evaluation."""

    def __init__(
        self,
        count: int = 7,
        vocab: int = 11,
        width: int = 5,
        *,
        padded: int = 0,
        bias: bool = False,
        adapter: bool = False,
        scale: float = 1.0,
        soft_cap: float | None = None,
        temperature: float = 1.0,
        frozen: bool = False,
        dtype: torch.dtype = torch.float64,
        banned: bool = False,
    ) -> None:
        draw = torch.Generator().manual_seed(count + 31 * vocab)
        normal: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        self.vocab, self.temperature, self.frozen, self.dtype = vocab, temperature, frozen, dtype
        self.tokens_N = torch.randint(vocab, (count,), generator=draw)
        self.hidden_ND = normal(count, width).to(dtype)
        self.plain = Head(
            normal(vocab + padded, width).to(dtype),
            normal(vocab + padded).to(dtype) if bias else None,
            scale,
            soft_cap,
            LowRank(normal(2, width).to(dtype), normal(vocab + padded, 2).to(dtype), 0.7) if adapter else None,
        )
        teacher_NV = 2 * normal(count, vocab + 2).to(dtype)
        if banned:
            teacher_NV[:, 0] = -math.inf
            self.tokens_N.clamp_min_(1)
        self.signal = Dense.of(teacher_NV, self.tokens_N, temperature=temperature)
        self.upstream = {name: normal(count) for name in every_value_names() if name != "still"}

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Head, list[Tensor]]:
        fresh: Callable[[Tensor, bool], Tensor] = (  # noqa: E731
            lambda values, learns: values.to(dtype).clone().requires_grad_(learns)
        )
        plain, learns = self.plain, not self.frozen
        hidden_ND = fresh(self.hidden_ND, True)
        parts = [hidden_ND, fresh(plain.weight_VD, learns)]
        bias_V = None if plain.bias_V is None else fresh(plain.bias_V, learns)
        adapter = None
        if plain.adapter is not None:  # the adapter learns, whatever the weight does
            low = plain.adapter
            adapter = LowRank(fresh(low.down_QD, True), fresh(low.up_VQ, True), low.scaling)
        head = Head(parts[1], bias_V, plain.scale, plain.soft_cap, adapter)
        more = [bias_V] if bias_V is not None else []
        more += [adapter.down_QD, adapter.up_VQ] if adapter is not None else []
        return hidden_ND, head, [part for part in parts + more if part.requires_grad]

    def core(self, head: Head, values: Callable[[Context], dict[str, Tensor]]) -> Core:
        return Core(
            values, Steps.of(self.tokens_N), Clock(), {"teacher": self.signal}, head, self.vocab, self.temperature
        )

    def scalar(self, values: Mapping[str, Tensor], rows: slice) -> Tensor:
        return torch.stack([(values[name] * u[rows]).sum() for name, u in self.upstream.items()]).sum()

    def definition(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        hidden_ND, head, leaves = self.leaves(torch.float64)
        values = self.core(head, by_definition).dense(hidden_ND)
        gradients = torch.autograd.grad(self.scalar(values, slice(None)), leaves)
        return {name: value.detach() for name, value in values.items()}, list(gradients)


def every_value_names() -> tuple[str, ...]:
    return ("reverse", "forward", "jsd", "entropy", "sampled", "top", "still")


def check(case: Case, chunk: int) -> None:
    """Both ways of the core against the definition."""
    wanted, gradients = case.definition()
    for name, found, leaves, total in (*_later(case, chunk), *_at_once(case, chunk)):
        for value in wanted:
            _close(found[value], wanted[value], case.dtype, f"{name}: {value}")
        assert not found["still"].requires_grad
        got = torch.autograd.grad(total, leaves)
        for place, (mine, theirs) in enumerate(zip(got, gradients, strict=True)):
            assert mine.dtype == leaves[place].dtype
            _close(mine, theirs, case.dtype, f"{name}: gradient {place}")


def _later(case: Case, chunk: int) -> Iterator[tuple[str, dict[str, Tensor], list[Tensor], Tensor]]:
    hidden_ND, head, leaves = case.leaves(case.dtype)
    values = per_token(case.core(head, every_value), hidden_ND, chunk=chunk)
    yield "values first", values, leaves, case.scalar(values, slice(None))


def _at_once(case: Case, chunk: int) -> Iterator[tuple[str, dict[str, Tensor], list[Tensor], Tensor]]:
    hidden_ND, head, leaves = case.leaves(case.dtype)
    total, values = loss_pass(case.core(head, every_value), hidden_ND, case.scalar, chunk=chunk)
    yield "at once", values, leaves, total
    hidden_ND, head, leaves = case.leaves(case.dtype)
    total, values = loss_pass(case.core(head, every_value), hidden_ND, case.scalar, chunk=chunk)
    # A third of the loss as it comes, two thirds through the values.
    yield "both", values, leaves, total / 3 + 2 * case.scalar(values, slice(None)) / 3


def _close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    found, finite = found.detach(), wanted.isfinite()
    assert torch.equal(found.isfinite(), finite), what
    scale = float(wanted[finite].abs().max()) if bool(finite.any()) else 1.0
    worst = float((found.double() - wanted)[finite].abs().max()) if bool(finite.any()) else 0.0
    assert worst <= TOLERANCE[dtype] * max(scale, 1e-3), f"{what}: off by {worst:.2e} of {scale:.2e}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 40)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padded": 3},
        {"bias": True},
        {"adapter": True},
        {"adapter": True, "frozen": True, "bias": True, "padded": 2},
        {"frozen": True},
        {"scale": 0.4},
        {"soft_cap": 2.0, "scale": 1.5},
        {"temperature": 2.0},
        {"soft_cap": 3.0, "bias": True, "adapter": True, "temperature": 0.7, "padded": 1},
        {"banned": True},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_every_head_in_value_and_gradient(settings: dict) -> None:
    check(Case(**settings) if "banned" not in settings else _banned(), chunk=3)


def _banned() -> Case:
    """A teacher that rules out an id: reverse KL is infinite, so its gradient is left out."""
    case = Case(banned=True)
    del case.upstream["reverse"]
    return case


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (63, 1), (1271, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_odd_numbers_of_steps(count: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 37 * rows)  # the last block of a chunk is smaller than the others
    check(Case(count, 37, 6, dtype=dtype), chunk=min(count, 40))


def test_no_steps_at_all() -> None:
    case = Case(0)
    hidden_ND, head, leaves = case.leaves(torch.float64)
    total, values = loss_pass(case.core(head, every_value), hidden_ND, case.scalar)
    total.backward()
    assert float(total.detach()) == 0.0
    assert all(len(value) == 0 for value in values.values())
    assert leaves[1].grad is not None
    assert float(leaves[1].grad.abs().sum()) == 0.0


@given(
    count=st.integers(2, 40), vocab=st.integers(4, 60), width=st.integers(1, 9), padded=st.integers(0, 3),
    chunk=st.integers(1, 39), temperature=st.sampled_from([1.0, 0.5, 3.0]), frozen=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(
    count: int, vocab: int, width: int, padded: int, chunk: int, temperature: float, frozen: bool
) -> None:
    case = Case(count, vocab, width, padded=padded, temperature=temperature, frozen=frozen)
    check(case, chunk=min(chunk, count - 1))


def test_bf16_inputs_are_summed_in_fp32() -> None:
    """Against float64 on the same bf16 inputs."""
    case = Case(300, 257, 32, dtype=torch.bfloat16)
    wanted, gradients = case.definition()
    hidden_ND, head, leaves = case.leaves(torch.bfloat16)
    total, values = loss_pass(case.core(head, every_value), hidden_ND, case.scalar, chunk=128)
    for name in case.upstream:
        assert values[name].dtype == torch.float32
        assert float((values[name].detach() - wanted[name]).norm() / wanted[name].norm()) < BF16_ERROR, name
    for mine, theirs in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine - theirs).norm() / theirs.norm()) < BF16_ERROR


@pytest.mark.parametrize("chunk", [128, 300], ids=["several chunks", "one chunk"])
@pytest.mark.parametrize(
    ("settings", "of_values", "of_gradients"),
    [({}, 1e-4, 3e-3), ({"bias": True, "padded": 3}, 3e-4, 3.5e-3), ({"adapter": True}, 2e-3, 8e-3)],
    ids=["plain", "bias", "adapter"],
)
def test_logits_of_bf16_are_not_rounded_before_the_softmax(
    settings: dict, of_values: float, of_gradients: float, chunk: int
) -> None:
    """Values lose next to nothing, and gradients what rounding two tensors to bf16 takes: 1.7e-3 each.

    What a bias and an adapter add is still rounded, and this adapter adds as much as the head. With logits rounded as a
    whole the gradients are off by 0.9e-2 to 1.6e-2.
    """
    case = Case(300, 257, 32, dtype=torch.bfloat16, **settings)
    wanted, gradients = case.definition()
    hidden_ND, head, leaves = case.leaves(torch.bfloat16)
    total, values = loss_pass(case.core(head, every_value), hidden_ND, case.scalar, chunk=chunk)
    for name in ("reverse", "forward", "jsd", "sampled"):
        assert float((values[name].detach() - wanted[name]).norm() / wanted[name].norm()) < of_values, name
    for mine, theirs in zip(torch.autograd.grad(total, leaves)[:2], gradients[:2], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < of_gradients


@pytest.mark.parametrize(("width", "held"), [(32, False), (256, True)], ids=["summed in pieces", "one product"])
def test_a_head_in_bf16_over_several_chunks(width: int, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three chunks, by a sum in fp32 or by one product of all steps."""
    monkeypatch.setattr(head, "PIECE_ELEMENTS", 100 * width)
    monkeypatch.setattr(head, "SLAB_ELEMENTS", 30 * width)
    found: list[bool] = []
    plain = head.Products.held

    def seen(self: head.Products, steps: int, chunk: int) -> Tensor | None:
        memory_NV = plain(self, steps, chunk)
        found.append(memory_NV is not None)
        return memory_NV

    monkeypatch.setattr(head.Products, "held", seen)
    case = Case(300, 257, width, padded=3, dtype=torch.bfloat16)
    _, gradients = case.definition()
    hidden_ND, of_case, leaves = case.leaves(torch.bfloat16)
    total, _ = loss_pass(case.core(of_case, every_value), hidden_ND, case.scalar, chunk=128)
    mine, theirs = torch.autograd.grad(total, leaves)[1], gradients[1]
    assert found == [held]
    assert float((mine - theirs).norm() / theirs.norm()) < 3e-3  # two roundings of 1.7e-3 each
    assert not mine[257:].any(), "padding gets none"


def test_a_small_kl_of_bf16_logits() -> None:
    """A true KL of about 0.00125 must not drown in the rounding of a bf16 softmax."""
    draw = torch.Generator().manual_seed(0)
    teacher_NV = (2 * torch.randn(64, 4096, generator=draw)).bfloat16()
    student_NV = (teacher_NV.float() + 0.05 * torch.randn(64, 4096, generator=draw)).bfloat16()
    exact = kl_values(student_NV.double().log_softmax(-1), teacher_NV.double().log_softmax(-1)).mean()
    context = Context.from_logits(
        logits_NV=student_NV, tokens_N=torch.zeros(64, dtype=torch.long),
        signals={"teacher": Dense.of(teacher_NV, torch.zeros(64, dtype=torch.long)).rows(slice(0, 64))},
    )  # fmt: skip
    assert 5e-4 < float(exact) < 3e-3
    found = context.student.reverse_kl(context.signal("teacher").distribution).mean()
    assert float(found) == pytest.approx(float(exact), rel=2e-4)


def test_autocast_decides_the_products() -> None:
    """Master weights in fp32, products in bf16: the gradient comes back in fp32."""
    case = Case(40, 257, 16, dtype=torch.float32)
    hidden_ND, head, leaves = case.leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss_pass(case.core(head, every_value), hidden_ND, case.scalar, chunk=16)
    gradients = torch.autograd.grad(total, leaves)
    _, wanted = case.definition()
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < BF16_ERROR


class _Kept:
    """A tensor that autograd holds on to; gone when the graph lets go of it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _saved(run: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward pass once the forward pass is over, each storage once."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(values: Tensor) -> _Kept:
        kept = _Kept(values)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.values):
        total = run()
    storages = {kept.values.untyped_storage().data_ptr(): kept.values.untyped_storage().nbytes() for kept in alive}
    assert total.requires_grad
    return sum(storages.values())


def test_what_is_kept_for_the_backward_pass_does_not_know_the_vocabulary_nor_the_terms() -> None:
    case = Case(200, 1000, 8, dtype=torch.float32)
    hidden_ND, head, _ = case.leaves(torch.float32)
    inputs = hidden_ND.nbytes + head.weight_VD.nbytes

    def at_once(values: Callable[[Context], dict[str, Tensor]]) -> Tensor:
        def scalar(found: Mapping[str, Tensor], rows: slice) -> Tensor:
            return torch.stack([value.sum() for value in found.values() if value.requires_grad]).sum()

        return loss_pass(case.core(head, values), hidden_ND, scalar, chunk=50)[0]

    def one(context: Context) -> dict[str, Tensor]:
        return {"reverse": context.student.reverse_kl(context.signal("teacher").distribution)}

    assert _saved(lambda: at_once(one)) <= inputs
    assert _saved(lambda: at_once(every_value)) <= inputs
    dense = _saved(lambda: case.core(head, by_definition).dense(hidden_ND)["reverse"])
    assert dense > 4 * 200 * 1000, "the hooks would see a tensor of [N, V]"


@pytest.mark.parametrize("bias", [False, True])
def test_products_through_onednn(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ONEDNN_ELEMENTS", 1)
    case = Case(63, 131, 24, bias=bias, dtype=torch.float32)
    hidden_ND, of_case, _ = case.leaves(torch.float32)
    with torch.no_grad():
        found = head.linear(hidden_ND, of_case.weight_VD, of_case.bias_V)
        plain = torch.nn.functional.linear(hidden_ND, of_case.weight_VD, of_case.bias_V)
    torch.testing.assert_close(found, plain)
    check(case, chunk=20)


def test_masked_steps_and_frozen_heads_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from retort.functional import linear_token_losses

    seen: list[tuple[int, tuple[bool, ...]]] = []
    plain = chunked.Products.forward

    def forward(self: chunked.Products, hidden_CD: Tensor) -> Tensor:
        seen.append((len(hidden_CD), self.needed))
        return plain(self, hidden_CD)

    monkeypatch.setattr(chunked.Products, "forward", forward)
    case = Case(12, 11, 5)
    hidden_ND, head, _ = case.leaves(torch.float64)
    mask = torch.arange(12) % 2 == 0
    losses = linear_token_losses(
        "gkd", student_hidden=hidden_ND, student_head=Head(head.weight_VD.detach()),
        teacher_hidden=hidden_ND.detach(), teacher_head=torch.randn(11, 5, dtype=torch.float64),
        tokens=case.tokens_N, mask=mask, chunk=4,
    )  # fmt: skip
    losses.loss.backward()
    assert [count for count, _ in seen] == [4, 2], "half of the steps, once: nothing is recomputed"
    assert all(needed == (True, False, False, False, False) for _, needed in seen)
    assert hidden_ND.grad is not None
    assert torch.equal(hidden_ND.grad[~mask], torch.zeros(6, 5, dtype=torch.float64))
