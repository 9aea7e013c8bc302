"""What every registered method promises of episodes: turns, and replies between them, which nobody decided.

On toy models in float64. The pack of `test_contract.py` that goes through the pipeline of a run has episodes, too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy import Toy

from retort import registry
from retort.method import Method

NAMES = registry.for_tokens()
#: Methods whose loss depends on which turn a token is of.
READ_TURNS: list[tuple[str, dict[str, Any]]] = [
    ("sod", {}),
    ("atod", {}),
    ("opad", {}),
    ("tcod", {"reduction": "turns"}),
]
#: In the toy's turns of three tokens, the last one is what the environment replied.
REPLY = 2


def replies(toy: Toy) -> torch.Tensor:
    """Which rows of a table of whole conversations are replies, [N], bool."""
    place_N = torch.cat([torch.arange(int(count)) for count in torch.bincount(toy.rollouts)])
    return place_N % 3 == REPLY


def learnt(toy: Toy, method: Method, **more: Any) -> tuple[torch.Tensor, ...]:
    """Loss and gradients, after a step of which the clip of a ratio binds somewhere."""
    losses = toy.losses(method, **{"old_logp": toy.old, **more})
    return losses.loss.detach(), *toy.gradients(losses.loss)


def alike(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_where_turns_begin_changes_nothing_for_methods_that_do_not_read_turns(name: str) -> None:
    toy, method = Toy(), registry.load(name)
    same = alike(learnt(toy, method), learnt(toy, method, turns=None))
    assert same == ((name, {}) not in READ_TURNS), f"does '{name}' read turns? READ_TURNS says another thing"


@pytest.mark.parametrize(("name", "settings"), READ_TURNS, ids=[name for name, _ in READ_TURNS])
def test_turns_are_told_apart_by_their_order_alone(name: str, settings: dict[str, Any]) -> None:
    """Their numbers may have gaps, as where all tokens of a turn were masked; turns of two rollouts are two turns."""
    toy, method = Toy(), registry.load(name, **settings)
    whole = learnt(toy, method)
    assert alike(whole, learnt(toy, method, turns=2 * toy.turns**2 + toy.rollouts))
    merged = learnt(toy, method, turns=toy.turns.clamp(max=1))
    assert not alike(whole, merged), "two turns that became one must count as one"


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in NAMES), READ_TURNS[-1]])
def test_a_reply_is_never_read_and_has_no_gradient(name: str, settings: dict[str, Any]) -> None:
    """Whole conversations with a mask give what the decided tokens alone give, whatever both models say of replies."""
    toy, method = Toy(), registry.load(name, **settings)
    reply_N = replies(toy)
    decided = (~reply_N).nonzero().squeeze(-1)
    expected = learnt(toy, method, rows=decided, old_logp=toy.old[decided])
    with torch.no_grad():
        toy.hidden[reply_N] += 3.0
        for view in method.views:
            toy.view(view)[0][reply_N] = math.nan
    found = learnt(toy, method, mask=~reply_N)
    assert found[0].isfinite() and found[1].abs().max() > 0
    assert not found[1][reply_N].any()
    assert alike(found, expected)
    through_head = toy.linear(method, mask=~reply_N, old_logp=toy.old, chunk=5)
    core = (through_head.loss.detach(), *toy.gradients(through_head.loss))
    assert not core[1][reply_N].any()
    assert alike(core, found)


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in NAMES), READ_TURNS[-1]])
def test_the_order_of_episodes_does_not_matter(name: str, settings: dict[str, Any]) -> None:
    toy, method = Toy(), registry.load(name, **settings)
    order = torch.cat([(toy.rollouts == rollout).nonzero().squeeze(-1) for rollout in (3, 0, 4, 2, 1)])
    one, other = learnt(toy, method), learnt(toy, method, rows=order, old_logp=toy.old[order])
    assert alike(one, other)
