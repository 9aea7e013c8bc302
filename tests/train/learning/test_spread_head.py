"""Where ranks compute the student's loss: on slices of its head, or on all of it. The runs are in tests/ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.head import Head, LowRank
from retort.core.shard import VocabShard
from retort.core.signals import Candidates, Dense, Factors, TopK
from retort.core.steps import Steps
from retort.divergences.adaptive import akl
from retort.errors import SignalError, UserError
from retort.models.sharding import bounds
from retort.teachers.itself import mix
from retort.train.learning import spread_head
from retort.train.learning.passes import HeadUse

DRAW = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "ranks"), [(12, 3), (266, 3), (9, 4), (2, 3), (151_936, 7)])
def test_a_rank_keeps_the_rows_that_torch_gives_it(rows: int, ranks: int) -> None:
    parts = torch.arange(rows).chunk(ranks)
    for rank in range(ranks):
        own = list(range(rows))[bounds(rows, ranks, rank)]
        assert own == (parts[rank].tolist() if rank < len(parts) else [])


def test_some_rows_of_a_head_give_these_columns() -> None:
    head = Head(drawn(7, 4), drawn(7), 0.5, 3.0, LowRank(drawn(2, 4), drawn(7, 2), 0.25))
    hidden_CD = drawn(3, 4)
    for ids in (slice(2, 5), torch.tensor([6, 0])):
        torch.testing.assert_close(head.rows(ids).logits(hidden_CD), head.logits(hidden_CD)[:, ids])


def dense(head: Head, states_ND: Tensor) -> Dense:
    return Dense(
        torch.zeros(len(states_ND), dtype=torch.long),
        logits=lambda rows: head.logits(states_ND[rows]),
        width=head.width,
        factors=Factors(lambda rows: states_ND[rows], lambda own_CD, ids: head.rows(ids).logits(own_CD)),
    )


def test_what_a_selection_and_a_mix_are_made_of() -> None:
    one, other = dense(Head(drawn(6, 4)), drawn(5, 4)), dense(Head(drawn(6, 4)), drawn(5, 4))
    signal = mix([one, other], [0.25, 0.75]).select(torch.tensor([4, 0, 2]))
    assert signal.factors is not None
    states_NS = signal.factors.states(slice(1, 3))
    assert states_NS.shape == (2, 8)
    wanted_CV = 0.25 * one.logits(torch.tensor([0, 2])) + 0.75 * other.logits(torch.tensor([0, 2]))
    torch.testing.assert_close(signal.factors.logits(states_NS, slice(2, 6)), wanted_CV[:, 2:])
    assert mix([one, Dense.of(drawn(5, 6), one.tokens_N)], [0.5, 0.5]).factors is None


def test_the_rule_counts_what_is_exchanged() -> None:
    """Qwen3-0.6B's head against hidden states of 1,024 and of 65,536 steps a rank, on 4 ranks."""
    head, few = spread_head.exchanged(151_936, 1024, 2048, 1024, 4)
    assert (head, few) == (2 * 151_936 * 1024 * 3 / 4, 1024 * 3 * (3 * 1024 + 2048))
    assert few < head < spread_head.exchanged(151_936, 1024, 2048, 65_536, 4)[1]


def test_signals_of_unlike_form_are_told_apart() -> None:
    tokens_N = torch.zeros(3, dtype=torch.long)
    ids_NK, logp_NK = torch.tensor([[0, 1]] * 3), torch.full((3, 2), -1.0)
    top = TopK(tokens_N, ids_NK=ids_NK, logp_NK=logp_NK)
    tops = (None, top, top.select(tokens_N))
    kinds = [spread_head._kind(Candidates(tokens_N, ids_NK=ids_NK, logp_NK=logp_NK, top=found)) for found in tops]
    assert kinds[0] != kinds[1] == kinds[2] is not None
    states = spread_head._kind(dense(Head(drawn(6, 4)), drawn(5, 4)))
    assert states is not None and states.states == 4
    assert spread_head._kind(Dense.of(drawn(3, 6), tokens_N)) is None


def test_what_needs_all_ids_says_so() -> None:
    tokens_N = torch.zeros(3, dtype=torch.long)
    signals = {"teacher": Dense.of(drawn(3, 6), tokens_N).rows(slice(None))}
    context = Context(Distribution(drawn(3, 6), VocabShard(0)), signals, Steps.of(tokens_N))
    with pytest.raises(SignalError, match="whole distribution, which no rank holds"):
        akl().value(context, "teacher")


@pytest.mark.parametrize("obstacle", [None, "it needs all ids"])
@pytest.mark.parametrize("tokens", [8, 10_000])
@pytest.mark.parametrize("setting", ["auto", "gathered", "vocabulary"])
def test_what_is_decided(monkeypatch: pytest.MonkeyPatch, setting: Any, tokens: int, obstacle: str | None) -> None:
    """The rule has a say in `auto` alone; what cannot be sliced is refused where slices were asked for."""

    class Named:
        def __init__(self, **given: Any) -> None:
            self.__dict__ |= given

    tried: list[int] = []
    monkeypatch.setattr(spread_head, "_obstacle", lambda *_: tried.append(1) or obstacle)
    said: list[str] = []
    use = HeadUse(setting, say=said.append)
    lm, world = Named(kept_head=lambda: Head(torch.empty(1000, 16))), Named(size=2, each=lambda work: [work(), work()])
    passes: Any = Named(head=use, lm=lm, world=world, batch_tokens=tokens)
    batch: Any = Named(method=Named(name="opd"), watches=(), signals={})
    tries = setting == "vocabulary" or (setting == "auto" and tokens == 8)
    if setting == "vocabulary" and obstacle:
        with pytest.raises(UserError, match="ranks.head=vocabulary: it needs all ids; set ranks.head=gathered"):
            spread_head.sliced(passes, batch)
        return
    for _ in range(2):  # asked once
        assert spread_head.sliced(passes, batch) == (tries and obstacle is None)
    assert len(tried) == tries
    assert len(said) == (setting != "gathered")
