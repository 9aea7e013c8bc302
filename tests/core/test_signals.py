"""What a signal refuses at the door, and what the top-k of a teacher can be asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Toy

from retort import registry
from retort.core.distribution import Distribution
from retort.core.signals import Candidates, Dense, Sampled, TeacherSignal, TopK
from retort.errors import SignalError, UserError

F64 = torch.float64
TOKENS = torch.tensor([0, 1])
IDS = torch.tensor([[2, 0, 5], [1, 3, 4]])
LOGP = torch.tensor([[0.5, 0.3, 0.1], [0.9, 0.05, 0.01]], dtype=F64).log()


def top(ids: Tensor = IDS, logp: Tensor = LOGP, **more: Any) -> TopK:
    return TopK(TOKENS, "t", ids, logp, **more)


@pytest.mark.parametrize(
    ("ids", "logp", "message"),
    [
        (IDS, LOGP.flip(-1), "not in order"),
        (torch.tensor([[2, 0, 2], [1, 3, 4]]), LOGP, "names an id twice"),
        (torch.tensor([[2, -1, 5], [1, 3, 4]]), LOGP, "negative"),
        (IDS, torch.tensor([[0.2, -1.0, -2.0], [-1.0, -2.0, -3.0]]), "above 0"),
        (IDS, torch.tensor([[-0.1, -0.2, -0.3], [-1.0, -2.0, -3.0]]), "more than 1"),
        (IDS, torch.tensor([[-0.5, math.nan, -2.0], [-1.0, -2.0, -3.0]]), "nan"),
        (IDS[:, :2], LOGP, r"\[N, K\]"),
    ],
)
def test_a_top_k_that_is_none_is_refused(ids: Tensor, logp: Tensor, message: str) -> None:
    with pytest.raises(SignalError, match=message):
        top(ids, logp)


@pytest.mark.parametrize(
    "valid_N", [torch.tensor([True]), torch.tensor([1, 0]), torch.tensor([[True, False]])], ids=["[R]", "int", "[1, N]"]
)
def test_a_valid_that_is_none_is_refused(valid_N: Tensor) -> None:
    """A teacher of somebody's own may say it per rollout, or as 0 and 1, which would pick steps 0 and 1."""
    logits_NV = torch.zeros(2, 6)

    def checked(signal: TeacherSignal) -> None:
        signal.check_tokens(TOKENS)

    makes: list[Callable[[], object]] = [
        lambda: checked(Sampled(TOKENS, "t", LOGP[:, 0], valid_N=valid_N)),
        lambda: checked(top(valid_N=valid_N)),
        lambda: checked(Candidates(TOKENS, "t", IDS, LOGP, valid_N=valid_N)),
        lambda: checked(replace(Dense.of(logits_NV, TOKENS, source="t"), valid_N=valid_N)),
    ]
    for make in makes:
        with pytest.raises(SignalError, match=r"t: valid_N must be bool \[N\] = \(2,\), not torch"):
            make()


def test_short_lists_ties_rounding_and_steps_without_context_are_fine() -> None:
    top(torch.tensor([[2, 0, 0], [1, 3, 3]]), torch.tensor([[-0.1, -math.inf, -math.inf], [-1.0, -1.0, -math.inf]]))
    top(IDS, torch.tensor([[0.004, -9.0, -9.0], [-1.0, -1.0, -1.5]]))  # bf16's 0
    nothing = torch.zeros(2, 3)
    assert top(nothing.long(), nothing, valid_N=torch.tensor([False, False])).select(torch.tensor([1])).steps == 1
    with pytest.raises(SignalError, match="twice .step 1"):
        top(nothing.long(), torch.full((2, 3), -2.0), valid_N=torch.tensor([False, True]))


def test_a_log_prob_of_a_written_token_is_one() -> None:
    for signal in (lambda logp: Sampled(TOKENS, "t", logp), lambda logp: top(sampled_logp_N=logp)):
        signal(torch.tensor([-math.inf, 0.001]))
        with pytest.raises(SignalError, match=r"above 0, .*step 1"):
            signal(torch.tensor([-1.0, 0.5]))
        with pytest.raises(SignalError, match="nan"):
            signal(torch.tensor([-1.0, math.nan]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["old_logp", "engine_logp"])
def test_the_students_own_log_probs_are_log_probs(name: str, value: float) -> None:
    toy, method = Toy(), registry.load("opd", correction="token")
    given = toy.old.clone()
    given[4] = value
    if name == "engine_logp" and math.isnan(value):  # said nothing: the token came from data
        assert toy.losses(method, engine_logp=given).loss.isfinite()
        return
    with pytest.raises(UserError, match=f"{name} holds .* no log-prob"):
        toy.losses(method, **{name: given})
    mask = torch.arange(len(toy.tokens)) != 4
    assert toy.losses(method, mask=mask, **{name: given}).loss.isfinite(), "what does not count is not read"


def test_a_top_k_looks_up_its_own_ids() -> None:
    rows = top().rows(slice(None))
    found = rows.logp_at(torch.tensor([[5, 2], [4, 4]]))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.1, 0.5], [0.01, 0.01]], dtype=F64))
    with pytest.raises(SignalError, match="no log-prob of id 7 .it kept 3"):
        rows.logp_at(torch.tensor([[5], [7]]))
    left = rows.logp_outside(IDS, torch.tensor([[True, False, True], [True, True, True]]))
    torch.testing.assert_close(left.exp(), torch.tensor([0.4, 0.04], dtype=F64))
    with pytest.raises(SignalError, match="no top-k"):
        top(IDS[:, :0], LOGP[:, :0], sampled_logp_N=LOGP[:, 0]).rows(slice(None)).logp_at(IDS)
    with pytest.raises(SignalError, match="no full distribution"):
        Sampled(TOKENS, "t", LOGP[:, 0]).rows(slice(None)).logp_at(IDS)


def test_a_top_k_says_what_the_whole_distribution_says() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=F64)
    tokens = torch.zeros(6, dtype=torch.long)
    whole = Dense.of(logits, tokens).rows(slice(None))
    ids, logp = whole.topk(5)
    short = TopK(tokens, "t", ids, logp).rows(slice(None))
    chosen = ids[:, [3, 0, 4]]
    torch.testing.assert_close(short.logp_at(chosen), whole.logp_at(chosen))
    inside = torch.tensor([True, False, True]).expand(6, 3)
    torch.testing.assert_close(short.logp_outside(chosen, inside), whole.logp_outside(chosen, inside))


def test_a_list_of_all_ids_leaves_nothing() -> None:
    """Not a rounding error: a forward KL with a bucket would be infinite, as the student leaves nothing."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    tokens = torch.zeros(3, dtype=torch.long)
    whole = Dense.of(logits, tokens).rows(slice(None))
    ids, logp = whole.topk(4)
    inside = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    for signal in (TopK(tokens, "t", ids, logp, whole=True), Candidates(tokens, "t", ids, logp)):
        found = signal.rows(slice(None), 4).logp_outside(ids, inside)
        torch.testing.assert_close(found, whole.logp_outside(ids, inside))
        assert found[0] == -math.inf


# --- ids that somebody else chose ---


def candidates(ids: Tensor = IDS, logp: Tensor = LOGP, **more: Any) -> Candidates:
    return Candidates(TOKENS, "t", ids, logp, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ids": torch.tensor([[2, 0, 2], [1, 3, 4]])}, "candidate names an id twice"),
        ({"ids": torch.tensor([[2, -1, 5], [1, 3, 4]])}, "negative"),
        ({"logp": torch.tensor([[0.2, -1.0, -2.0], [-1.0, -2.0, -3.0]])}, "above 0"),
        ({"logp": torch.tensor([[-0.1, -0.2, -0.3], [-1.0, -2.0, -3.0]])}, "more than 1"),
        ({"logp": torch.tensor([[-0.5, math.nan, -2.0], [-1.0, -2.0, -3.0]])}, "nan"),
        ({"ids": IDS[:, :2]}, r"\[N, K\]"),
        ({"ids": IDS[:1], "logp": LOGP[:1]}, "1 steps, the rollouts have 2"),
        ({"sampled_logp_N": torch.tensor([-1.0, math.nan])}, "log-prob of a sampled token is nan"),
        ({"top": TopK(TOKENS + 1, "t", IDS, LOGP)}, "misaligned at step 0"),
    ],
)
def test_candidates_that_are_none_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        candidates(**more)


def test_candidates_need_no_order_and_may_be_ruled_out() -> None:
    found = candidates(logp=LOGP.flip(-1)).select(torch.tensor([1, 0]))
    assert found.ids_NK.tolist() == IDS.flip(0).tolist()
    candidates(logp=torch.tensor([[-math.inf, -1.0, -math.inf], [-1.0, -2.0, -3.0]]))


def test_candidates_say_what_they_were_asked_and_no_more() -> None:
    rows = candidates().rows(slice(None), 9)
    first = rows.candidates(2)
    assert first is not None and first.tolist() == IDS[:, :2].tolist()
    torch.testing.assert_close(rows.logp_at(first), LOGP[:, :2])
    torch.testing.assert_close(rows.logp_at(IDS.flip(-1)), LOGP.flip(-1))
    missing: list[Any] = [
        (lambda: rows.candidates(4), "no log-probs of the student's top-4 .it kept 3"),
        (lambda: rows.logp_at(torch.tensor([[2], [7]])), "no log-prob of id 7"),
        (lambda: rows.sampled_logp_N, "no log-prob of the sampled token"),
        (lambda: rows.topk(1), "no top-k"),
        (lambda: rows.entropy_N, "no entropy"),
        (lambda: rows.logp_NV, "no full distribution"),
    ]
    for ask, message in missing:
        with pytest.raises(SignalError, match=f"t: .*{message}"):
            ask()
    assert candidates().offers == {"logp_at"}
    assert top().rows(slice(None)).candidates(1) is None, "a top-k is its own"


def test_candidates_carry_what_else_was_asked_for() -> None:
    own = TopK(TOKENS, "t", torch.tensor([[7, 2], [1, 8]]), LOGP[:, [0, 1]] - 0.5, entropy_N=LOGP.abs().sum(-1))
    signal = candidates(sampled_logp_N=LOGP[:, 0], top=own)
    assert signal.offers == {"logp_at", "sampled", "topk", "entropy"}
    rows = signal.select(torch.tensor([1])).rows(slice(None), 9)
    assert rows.topk(2)[0].tolist() == [[1, 8]]
    torch.testing.assert_close(rows.entropy_N, LOGP.abs().sum(-1)[1:])
    torch.testing.assert_close(rows.sampled_logp_N, LOGP[1:, 0])
    torch.testing.assert_close(rows.logp_at(torch.tensor([[4, 8]])), torch.stack([LOGP[1:, 2], own.logp_NK[1:, 1]], 1))


# --- what is left outside of some ids ---


def test_what_is_left_and_its_gradient_are_those_of_autograd() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    # Twice, once meant and once not; meant by nobody; all of them but one.
    ids = torch.tensor([[1, 4, 1], [0, 2, 3], [5, 5, 5], [0, 1, 2], [8, 7, 6]])
    inside = torch.tensor([[True, True, False], [False] * 3, [True, False, False], [True] * 3, [False, True, True]])
    found = Distribution(logits).logp_outside(ids, inside)
    for row, (own, meant) in enumerate(zip(ids.tolist(), inside.tolist(), strict=True)):
        named = {i for i, yes in zip(own, meant, strict=True) if yes}
        wanted = logits[row].softmax(-1)[[v for v in range(9) if v not in named]].sum().log()
        torch.testing.assert_close(found[row], wanted)
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0][row] for x in (found[row], wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_nothing_left_is_minus_infinity_without_a_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]], dtype=F64, requires_grad=True)
    everything = torch.tensor([[0, 1]])
    found = Distribution(logits).logp_outside(everything, torch.ones_like(everything, dtype=torch.bool))
    assert found.item() == -math.inf
    assert torch.autograd.grad(found.sum(), logits)[0].tolist() == [[0.0, 0.0, 0.0]]
