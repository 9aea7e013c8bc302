"""What an engine keeps of a conversation between its turns: the same completions, fewer tokens, never old weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from retort.core.random_streams import uniforms
from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.rollout.engines.base import Completion, Request, Sampling, TurnCache
from retort.rollout.engines.decode import can_continue, can_decode
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.kept import KeptRow

#: Families whose layers keep every token, and others.
CONTINUE: list[dict[str, Any]] = [
    {"family": "qwen3"},
    {"family": "llama", "num_key_value_heads": 2},
    {"family": "cohere", "logit_scale": 0.25},
    {"family": "granite", "logits_scaling": 4.0},
]
SLIDES: dict[str, Any] = {
    "family": "gemma2",
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
}
ROOM, TURNS = 6, 4


def load(folder: Path) -> LanguageModel:
    stops = list(range(2, 58, 4))
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"), stop=stops)


def play(
    engine: HFEngine, contexts: Sequence[TokenSequence], caches: Sequence[TurnCache | None], *, turns: int = TURNS
) -> list[tuple[TokenSequence, list[Completion]]]:
    """Conversations of several turns with replies of several lengths; one whose turn is cut off ends."""
    talks = list(contexts)
    said: list[list[Completion]] = [[] for _ in talks]
    for turn in range(turns):
        open_ = [n for n in range(len(talks)) if not said[n] or said[n][-1].status == Status.COMPLETED]
        asked = [Request(talks[n], uniforms(0, "rollouts", n, turn, count=ROOM), caches[n]) for n in open_]
        for n, found in zip(open_, engine.generate(asked, Sampling(ROOM, 1.3)), strict=True):
            said[n].append(found)
            talks[n] = talks[n].then(found.ids, decided=True)
            if found.status == Status.COMPLETED and turn + 1 < turns:
                talks[n] = talks[n].then([9 + (n + turn + place) % 40 for place in range(1 + (3 * n + turn) % 5)])
    return list(zip(talks, said, strict=True))


def contexts(count: int = 9) -> list[TokenSequence]:
    """Of several lengths, some of them the same."""
    return [TokenSequence.of([5 + n % 4 + place for place in range(3 + 7 * (n % 4))]) for n in range(count)]


def tokens_read(lm: LanguageModel) -> list[int]:
    """A list that grows by the tokens of every pass of the model, padding included."""
    found: list[int] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("arguments", CONTINUE, ids=lambda arguments: arguments["family"])
def test_turns_that_go_on_say_what_turns_that_are_read_anew_say(
    model_folder: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    lm = load(model_folder(seed=5, **arguments))
    with torch.no_grad():
        assert can_decode(lm)
        assert can_continue(lm)
    engine = HFEngine(lm, vocab=58, max_parallel=16)
    engine.loops = engine.continues = True
    passes = tokens_read(lm)
    anew = play(engine, contexts(), [None] * 9)
    cost_anew = sum(passes)
    passes.clear()
    kept = play(engine, contexts(), [TurnCache() for _ in range(9)])
    assert 2 * sum(passes) < cost_anew
    assert len({len(said) for _, said in kept}) > 1, "no conversation ended before another"
    for (talk, said), (other, said_anew) in zip(kept, anew, strict=True):
        assert talk.tokens_L.tolist() == other.tokens_L.tolist()
        for one, two in zip(said, said_anew, strict=True):
            torch.testing.assert_close(one.logp_A, two.logp_A, rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_keep_every_token_are_read_anew(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=5, **SLIDES))
    caches = [TurnCache() for _ in range(5)]
    engine = HFEngine(lm, vocab=58, max_parallel=16)
    kept = play(engine, contexts(5), caches, turns=2)
    assert engine.loops
    assert not engine.continues
    assert all(cache.state is None for cache in caches)
    anew = play(engine, contexts(5), [None] * 5, turns=2)
    assert [talk.tokens_L.tolist() for talk, _ in kept] == [talk.tokens_L.tolist() for talk, _ in anew]


@pytest.fixture
def one_turn(model_folder: Callable[..., Path]) -> tuple[HFEngine, list[TokenSequence], list[TurnCache]]:
    """An engine after the first turns of some conversations, and what they go on with."""
    engine = HFEngine(load(model_folder(seed=5)), vocab=58, max_parallel=16)
    engine.loops = engine.continues = True
    caches = [TurnCache() for _ in range(12)]
    played = play(engine, contexts(12), caches, turns=1)
    ended = [n for n, (_, said) in enumerate(played) if said[-1].status == Status.COMPLETED]
    assert 1 < len(ended) < 12
    assert [cache.state is not None for cache in caches] == [n in ended for n in range(12)]
    return engine, [played[n][0].then([9, 10 + n, 11]) for n in ended], [caches[n] for n in ended]


def next_turn(engine: HFEngine, talks: Sequence[TokenSequence], caches: Sequence[TurnCache | None]) -> torch.Tensor:
    asked = [
        Request(talk, uniforms(0, "rollouts", n, 1, count=ROOM), own)
        for n, (talk, own) in enumerate(zip(talks, caches, strict=True))
    ]
    return torch.cat([found.logp_A for found in engine.generate(asked, Sampling(ROOM))])


def test_new_weights_read_all_anew(one_turn: Any) -> None:
    engine, talks, caches = one_turn
    rows = [cache.state for cache in caches]
    with torch.no_grad():
        for weight in engine.lm.model.parameters():
            weight.mul_(1.1)
    engine.update(1)
    assert not any(row.layers for row in rows)
    found = next_turn(engine, talks, caches)
    assert torch.equal(found, next_turn(engine, talks, [None] * len(talks)))


def test_what_another_engine_kept_is_not_read(one_turn: Any) -> None:
    engine, talks, caches = one_turn
    other = HFEngine(engine.lm, vocab=58, max_parallel=16)
    other.loops = other.continues = True
    passes = tokens_read(engine.lm)
    next_turn(other, talks, caches)
    assert passes[0] == len(talks) * max(map(len, talks))


def test_a_conversation_that_was_written_anew_is_read_anew_where_it_differs(one_turn: Any) -> None:
    engine, talks, caches = one_turn
    anew = [TokenSequence.of([40 + n, *talk.tokens_L.tolist()]) for n, talk in enumerate(talks)]
    found = next_turn(engine, anew, caches)
    assert torch.equal(found, next_turn(engine, anew, [None] * len(talks)))


def test_a_turn_that_was_changed_is_read_from_the_change_on(one_turn: Any) -> None:
    engine, talks, caches = one_turn
    changed = [TokenSequence.of([*talk.tokens_L.tolist()[:-4], 33, 34, 35]) for talk in talks]
    found = next_turn(engine, changed, caches)
    torch.testing.assert_close(found, next_turn(engine, changed, [None] * len(talks)), rtol=1e-4, atol=1e-5)


def test_no_more_is_kept_than_there_is_room_for(model_folder: Callable[..., Path]) -> None:
    engine = HFEngine(load(model_folder(seed=5)), vocab=58, max_parallel=3)
    engine.loops = engine.continues = True
    caches = [TurnCache() for _ in range(12)]
    few = play(engine, contexts(12), caches, turns=1)
    assert 1 <= sum(cache.state is not None for cache in caches) <= 3
    engine.max_parallel = 16
    many = play(engine, contexts(12), [None] * 12, turns=1)
    assert [talk.tokens_L.tolist() for talk, _ in few] == [talk.tokens_L.tolist() for talk, _ in many]


def test_what_is_kept_goes_with_the_conversation(one_turn: Any) -> None:
    _, _, caches = one_turn
    rows: WeakSet[KeptRow] = WeakSet(cache.state for cache in caches)
    assert len(rows) == len(caches)
    for cache in caches:
        cache.clear()
    gc.collect()
    assert not rows
