"""The token of a number: exactly the id whose interval of the cumulative distribution holds it."""

from __future__ import annotations

import pytest
import torch

from retort.rollout.engines import sample as sampling
from retort.rollout.engines.sample import nucleus, sample

#: One block, one block and a bit, whole blocks only, many blocks.
WIDTHS = [2, 50, 513, 1024, 5000]


def logits_of(vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab", WIDTHS)
def test_every_id_is_drawn_by_its_own_interval(vocab: int, temperature: float) -> None:
    """From one edge to the other: at a millionth of the interval's width (and of the rounding of sums) inside."""
    logits = logits_of(vocab)
    probs = (logits.double() / temperature).softmax(-1)
    ends = probs.cumsum(-1)
    ids = torch.arange(vocab)
    inside = torch.minimum(probs * 0.25, torch.tensor(2e-6))
    wide = probs > 1e-6  # narrower ones are narrower than the sums' rounding: their place is checked by the next test
    for numbers in (ends - probs + inside, ends - probs / 2, ends - inside):
        token_B, logp_B = sample(logits.expand(vocab, -1), numbers.clamp(0, 1 - 2**-53), temperature)
        assert torch.equal(token_B[wide], ids[wide])
        torch.testing.assert_close(logp_B, probs[token_B].log().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_the_share_of_each_id_is_its_probability(vocab: int) -> None:
    """The edges, found by bisection on the number, are those of the cumulative distribution to rounding."""
    logits = logits_of(vocab, seed=1)
    ends = logits.double().softmax(-1).cumsum(-1)
    low, high = torch.zeros(vocab - 1, dtype=torch.float64), torch.ones(vocab - 1, dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        before = sample(logits.expand(vocab - 1, -1), middle)[0] <= torch.arange(vocab - 1)
        low, high = torch.where(before, middle, low), torch.where(before, high, middle)
    torch.testing.assert_close(low, ends[:-1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("vocab", WIDTHS)
def test_an_id_without_probability_is_never_drawn(vocab: int) -> None:
    logits = logits_of(vocab)
    logits[::2] = float("-inf")
    logits[vocab // 2 :] = float("-inf")
    logits[min(1, vocab // 2)] = 0.0
    numbers = torch.cat([torch.tensor([0.0, 1 - 2**-53]).double(), torch.linspace(0, 1 - 1e-9, 500).double()])
    token_B, logp_B = sample(logits.expand(len(numbers), -1), numbers)
    assert logits[token_B].isfinite().all()
    assert logp_B.isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.stack([logits_of(700, seed) for seed in range(30)])
    numbers = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token_B, logp_B = sample(logits, numbers, 0.8, 0.9)
    monkeypatch.setattr(sampling, "_ELEMENTS_CPU", 1)
    again_B, logp_again_B = sample(logits, numbers, 0.8, 0.9)
    assert torch.equal(token_B, again_B)
    assert torch.equal(logp_B, logp_again_B)


@pytest.mark.parametrize("vocab", [50, 1300])
def test_nucleus_sampling_draws_from_the_renormalised_nucleus(vocab: int) -> None:
    logits = logits_of(vocab)
    numbers = torch.linspace(0, 1 - 1e-9, 2000).double()
    token_B, logp_B = sample(logits.expand(2000, -1), numbers, 1.0, 0.7)
    cut = nucleus(logits.log_softmax(-1)[None], 0.7)[0]
    assert set(token_B.tolist()) <= set(cut.isfinite().nonzero().squeeze(1).tolist())
    torch.testing.assert_close(logp_B, cut[token_B], rtol=1e-4, atol=1e-5)
    ends = cut.double().exp().cumsum(-1)
    expected = torch.searchsorted(ends, numbers * ends[-1], right=True)
    assert (token_B != expected).sum() <= 2, "other than at an edge"


def test_bf16_logits_are_drawn_from_as_they_are() -> None:
    logits = logits_of(600).bfloat16()
    numbers = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, two in zip(
        sample(logits.expand(64, -1), numbers), sample(logits.float().expand(64, -1), numbers), strict=True
    ):
        assert torch.equal(one, two)
