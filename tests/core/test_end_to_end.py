"""The signals about the parts of a batch, put together, are the signal about all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.head import Head
from retort.core.signals import Dense, Differing, Factors, Sampled, TeacherSignal, TopK, end_to_end
from retort.errors import SignalError

N, V, D = 17, 40, 16
PARTS = (slice(0, 5), slice(5, 6), slice(6, N))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TOKENS_N = torch.arange(N) % V
HIDDEN_ND, LOGP_NV, HEAD = drawn(N, D), drawn(N, V).log_softmax(-1), Head(drawn(V, D))


def of_states(part: slice) -> TeacherSignal:
    hidden = HIDDEN_ND[part]

    def product(hidden_CD: Tensor) -> Tensor:
        return HEAD.logits(hidden_CD)

    return Dense(
        TOKENS_N[part],
        "teacher",
        lambda rows: product(hidden[rows]),
        V,
        hidden=lambda rows: hidden[rows],
        factors=Factors(lambda rows: hidden[rows], lambda own, ids: HEAD.rows(ids).logits(own), product),
    )


def of_logits(part: slice) -> TeacherSignal:
    return Dense.of(LOGP_NV[part], TOKENS_N[part])


def listed(part: slice) -> TeacherSignal:
    logp_NK, ids_NK = LOGP_NV[part].topk(4)
    return TopK(TOKENS_N[part], "teacher", ids_NK, logp_NK, sampled(part).logp_N, drawn(N)[part].abs())


def sampled(part: slice) -> Sampled:
    logp_N = LOGP_NV[part].gather(1, TOKENS_N[part][:, None]).squeeze(1)
    valid_N = torch.ones(len(logp_N), dtype=torch.bool) if part.stop == 5 else None
    return Sampled(TOKENS_N[part], "teacher", logp_N, valid_N=valid_N, counts={"prompt_tokens": len(logp_N)})


def differing(part: slice) -> TeacherSignal:
    return Differing.beside(of_logits(part), drawn(N)[part].abs())


KINDS: dict[str, tuple[Callable[[slice], TeacherSignal], tuple[str, ...]]] = {
    "states": (of_states, ("logp_NV", "sampled_logp_N", "hidden_ND")),
    "logits": (of_logits, ("logp_NV", "sampled_logp_N")),
    "listed": (listed, ("sampled_logp_N", "entropy_N")),
    "sampled": (sampled, ("sampled_logp_N",)),
    "differing": (differing, ("logp_NV", "disagreement_N")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_signal_about_all_steps_to_the_bit(kind: str) -> None:
    make, names = KINDS[kind]
    whole, found = make(slice(0, N)), end_to_end([make(part) for part in PARTS])
    assert found.offers == whole.offers
    found.check_tokens(TOKENS_N)
    for index in (slice(0, N), slice(3, 9), torch.tensor([16, 0, 5])):
        rows: tuple[Any, Any] = found.rows(index), whole.rows(index)
        for name in names:
            if name == "hidden_ND":
                assert torch.equal(found.hidden_states(), whole.hidden_states())
            else:
                one, other = (getattr(own, name) for own in rows)
                assert torch.equal(one, other), name
        if kind == "listed":
            assert all(torch.equal(one, other) for one, other in zip(rows[0].topk(4), rows[1].topk(4), strict=True))


def test_counts_add_up_and_one_part_stays_as_it_is() -> None:
    found = end_to_end([sampled(part) for part in PARTS])
    assert found.counts == {"prompt_tokens": N}
    assert found.valid_N is not None and bool(found.valid_N.all())
    only = sampled(slice(0, 5))
    assert end_to_end([only]) is only


def test_factors_of_ranks_stay(kind: str = "states") -> None:
    found = end_to_end([KINDS[kind][0](part) for part in PARTS])
    assert isinstance(found, Dense) and found.factors is not None
    states_NS = found.factors.states(slice(2, 8))
    assert torch.equal(states_NS, HIDDEN_ND[2:8])
    torch.testing.assert_close(found.factors.logits(states_NS, slice(3, 7)), HEAD.logits(HIDDEN_ND[2:8])[:, 3:7])


def test_several_kinds_are_refused() -> None:
    with pytest.raises(SignalError, match="must be of one kind"):
        end_to_end([sampled(PARTS[0]), replace(of_logits(PARTS[1]))])
