"""Batches that wait in a checkpoint come back as they were: every field, every tensor, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.messages import Message
from retort.core.rollouts import Outcome, Prompt, Rollout, Status
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.train.source.unended import Unended
from retort.train.source.waiting_batches import WaitingBatch, stored, unstored

PROMPTS = [Prompt(f"row {n}", (Message("user", f"ask {n}"),), answer=str(n), privileged={"hint": "h"}) for n in (1, 2)]
SAID = (Message("assistant", "I call", {"tool_calls": [{"id": "1"}]}), Message("tool", "é ü"))
#: As environments begin an episode: other messages, tools of their own.
BEGUN = replace(PROMPTS[1], messages=(Message("system", "room"), *SAID), tools=({"name": "look"},))


def rollouts() -> list[Rollout]:
    one = TokenSequence.of([5, 6]).then([7, 8], decided=True)
    two = TokenSequence.of([5]).then([9], decided=True).then([1, 2]).then([3, 4], decided=True)
    return [
        Rollout(
            PROMPTS[0], one, engine_logp_A=torch.tensor([-0.1, -1e-7]), policy_version=7, visit=3, text="so", reward=0.1
        ),
        Rollout(
            PROMPTS[0],
            one,
            member=1,
            visit=3,
            status=Status.TRUNCATED,
            source="dataset",
            text="é",
            segments=((3, 1), (5, 1)),
        ),
        Rollout(
            BEGUN,
            (one, two),
            turn_A=torch.tensor([0, 0, 1, 2, 2]),
            engine_logp_A=torch.arange(5) / -7,
            reward_parts={"form": 0.5},
            feedback="no",
            measures={"success": 1.0},
            outcomes=(Outcome(SAID, 0.5, {"x": 1.0}), Outcome()),
            histories=(SAID,),
        ),
    ]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, TokenSequence):
        return same(one.tokens_L, two.tokens_L) and same(one.action_mask_L, two.action_mask_L)
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_every_field_comes_back() -> None:
    a, b, c = rollouts()
    unended = (Unended.without([a], 2), Unended(going_on=3, awaiting_group=1))
    batches = [
        WaitingBatch(4, 7, [(a, b), (c,)], 2, ("broke",), 1.5, unended=unended[0]),
        WaitingBatch(5, 9, [(c,), (a,)], unended=unended[1]),
    ]
    tensors = {**stored(batches, PROMPTS), "replay/ids": torch.zeros(3)}
    back = unstored(tensors, PROMPTS)
    for old, new in zip(batches, back, strict=True):
        assert [[own.member for own in group] for group in old.groups] == [
            [own.member for own in group] for group in new.groups
        ]
        assert replace(old, groups=[]) == replace(new, groups=[])
        for mine, found in zip(sum(old.groups, ()), sum(new.groups, ()), strict=True):
            assert type(mine) is type(found)
            for field in fields(Rollout):
                assert same(getattr(mine, field.name), getattr(found, field.name)), field.name


def test_nothing_is_kept_where_nothing_waits() -> None:
    assert stored([], PROMPTS) == {}
    assert unstored({"replay/ids": torch.zeros(3)}, PROMPTS) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"sequences": (TokenSequence.of([5], (Media("image", 0, 1, "d"),)).then([7], decided=True),)},
            "holds an image",
        ),
        ({"prompt": replace(PROMPTS[0], id="row 9")}, "made another task of it"),
        ({"prompt": replace(PROMPTS[0], answer="other")}, "made another task of it"),
    ],
    ids=["an image", "another row", "another answer"],
)
def test_what_would_not_come_back_is_refused(change: Mapping[str, Any], words: str) -> None:
    plain = Rollout(PROMPTS[0], TokenSequence.of([5]).then([7], decided=True))
    stored([WaitingBatch(0, 0, [(plain,)])], PROMPTS)
    with pytest.raises(UserError, match=rf"prompt 'row \d'.*{words}.*set rollout.staleness=0"):
        stored([WaitingBatch(0, 0, [(replace(plain, **change),)])], PROMPTS)
