"""Places in a pack, and segments of a rollout."""

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


def test_a_rollout_that_is_cut_keeps_the_segments_of_what_stays() -> None:
    whole = Rollout(
        Prompt("row", ()), TokenSequence.of([0]).then(range(2, 9), decided=True), segments=((3, 4), (5, 2), (8, 1))
    )
    assert whole.tokens_by_version == ((3, 4), (5, 2), (8, 1))
    cut = [whole.cut(steps, "").segments for steps in (7, 6, 5, 4, 1)]
    assert cut == [((3, 4), (5, 2), (8, 1)), ((3, 4), (5, 2)), ((3, 4), (5, 1)), ((3, 4),), ((3, 1),)]
    assert Rollout(whole.prompt, whole.sequence, policy_version=6).tokens_by_version == ((6, 7),)
    with pytest.raises(ValueError, match="segments .* for 7 decided tokens"):
        Rollout(whole.prompt, whole.sequence, segments=((3, 4),))
