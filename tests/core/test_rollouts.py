"""Places in a pack."""

from __future__ import annotations

import pytest

from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [3, 0], [2], [1], [], [1, 3, 1]], ids=str)
def test_steps_of_some_rollouts_in_the_order_given(chosen: list[int]) -> None:
    prompt = Prompt("row", (Message("user", "x"),))
    steps = [3, 0, 5, 1]
    pack = Pack.of([Rollout(prompt, TokenSequence.of([0, 1]).then(range(2, 2 + n), decided=True)) for n in steps])
    starts = [0, 3, 3, 8]
    expected = [place for i in chosen for place in range(starts[i], starts[i] + steps[i])]
    assert pack.steps_of(chosen).tolist() == expected
