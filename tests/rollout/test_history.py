"""Conversations that are rendered anew: a bounded history, and templates that write earlier turns otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tokenizer_of
from talks import ASKED, READING, REPLIES, TURNS, first_steps, played, said, words

from retort.align.chat import render
from retort.align.replies import reply_ids
from retort.core.rollouts import Group, Message, Pack, Prompt, Status
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.ranks import Share
from retort.ranks.world import World
from retort.rollout.record import token_row
from retort.train.source.cache import RolloutCache


@pytest.mark.parametrize("history", [1, 2, 3, 9])
def test_each_turn_follows_the_first_prompt_and_the_last_exchanges(history: int) -> None:
    tokenizer = words()
    rollout = played(tokenizer, history=history)
    assert len(rollout.sequences) == len(TURNS)
    for turn, (text, sequence) in enumerate(zip(TURNS, rollout.sequences, strict=True)):
        shown = replace(ASKED, messages=(*ASKED.messages, *said(TURNS, max(0, turn - history), turn)))
        assert sequence.prefix.tokens_L.tolist() == render(shown, tokenizer, READING)
        assert sequence.actions_A.tolist() == tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
    assert rollout.histories == tuple(said(TURNS, max(0, turn - history), turn) for turn in range(1, len(TURNS)))


def test_without_exchanges_the_last_reply_continues_the_prompt() -> None:
    tokenizer = words()
    rollout = played(tokenizer, history=0)
    for reply, sequence in zip(REPLIES, rollout.sequences[1:], strict=True):
        shown = Prompt("p", (Message("user", f"add 3\n\n{reply}"),))
        assert sequence.prefix.tokens_L.tolist() == render(shown, tokenizer, READING)


def test_all_that_is_of_the_rollout_is_the_same_however_it_is_cut() -> None:
    grown, cut = (played(words(), history=history) for history in (None, 1))
    assert (len(grown.sequences), grown.splits, len(cut.sequences), cut.splits) == (1, 0, 4, 3)
    assert grown.action_ids == cut.action_ids
    assert grown.turn_A is not None
    assert cut.turn_A is not None
    assert torch.equal(grown.turn_A, cut.turn_A)
    assert torch.equal(grown.engine_logp_A, cut.engine_logp_A)  # type: ignore[arg-type]
    for name in ("text", "reward", "status", "measures", "outcomes", "steps", "prefix_ids"):
        assert getattr(grown, name) == getattr(cut, name), name
    packs = [Pack.of([own, played(words(), ["3", "4", "5", "6"])]) for own in (grown, cut)]
    for name in ("tokens_N", "rollout_N", "position_N", "turn_N", "group_N", "reward_N", "engine_logp_N"):
        assert torch.equal(*(getattr(pack.steps, name) for pack in packs)), name
    assert packs[1].sequences_of([1, 0]) == [4, 0, 1, 2, 3]
    for order in ([0, 1], [1], [1, 0]):
        assert torch.equal(packs[1].steps_in(packs[1].sequences_of(order)), packs[0].steps_of(order))
    assert packs[1].steps_in([2]).tolist() == [5, 6, 7]


def test_a_history_of_all_of_it_reads_what_a_growing_conversation_reads() -> None:
    grown, anew = (played(words(), history=history) for history in (None, len(TURNS)))
    steps = first_steps(grown.sequence)
    assert [own.prefix.tokens_L.tolist() for own in anew.sequences] == [
        grown.sequence.before(step).tokens_L.tolist() for step in steps
    ]


@pytest.mark.parametrize(("history", "turns"), [(None, 2), (1, 4)])
def test_the_context_is_exceeded_by_a_sequence_and_not_by_an_episode(history: int | None, turns: int) -> None:
    rollout = played(words(), context=24, history=history)
    assert rollout.turn_A is not None
    assert int(rollout.turn_A.max()) + 1 == turns
    assert rollout.status == (Status.COMPLETED if turns == len(TURNS) else Status.TRUNCATED)
    assert max(map(len, rollout.sequences)) <= 24


THOUGHT = tuple(f"<think>\nadd {number}\n</think>\n\n{turn}" for number, turn in enumerate(TURNS))


def test_a_template_that_drops_thinking_splits_the_episode_there() -> None:
    """The conversation that the template writes has the answers alone; what is scored is what was read."""
    tokenizer = tokenizer_of("qwen3")
    rollout = played(tokenizer, THOUGHT)
    assert rollout.splits == len(TURNS) - 1
    for turn, sequence in enumerate(rollout.sequences):
        shown = replace(ASKED, messages=(*ASKED.messages, *said(TURNS, 0, turn)))
        assert sequence.prefix.tokens_L.tolist() == render(shown, tokenizer, READING)
    assert tokenizer.decode(rollout.sequences[1].actions_A).startswith("<think>\nadd 1\n</think>")
    row = token_row(Pack.of([rollout]), 0, {}, tokenizer)
    steps = torch.tensor([own.steps for own in rollout.sequences])
    assert [own["before"] for own in row["anew"]] == steps.cumsum(0).tolist()[:-1]
    assert [own["ids"] for own in row["anew"]] == [own.prefix.tokens_L.tolist() for own in rollout.sequences[1:]]
    assert "between" not in row


def test_only_where_a_turn_thinks_is_there_a_split() -> None:
    rollout = played(tokenizer_of("qwen3"), (TURNS[0], THOUGHT[1], *TURNS[2:]))
    assert [first_steps(own)[-1] > 0 for own in rollout.sequences] == [True, True]
    assert rollout.splits == 1


@pytest.mark.parametrize("name", ["qwen3", "llama3.1", "chatml"])
def test_a_template_that_only_adds_splits_nothing(name: str) -> None:
    tokenizer = words() if name == "chatml" else tokenizer_of(name)
    rollout = played(tokenizer)
    prompt_ids, expected = render(ASKED, tokenizer, READING), list[int]()
    for turn, text in enumerate(TURNS):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        replies = (Message("user", REPLIES[turn]),) if turn < len(REPLIES) else ()
        expected += ids + (reply_ids(ASKED, replies, ids[-1], tokenizer, READING) if replies else [])
    assert rollout.sequence.tokens_L.tolist() == [*prompt_ids, *expected]


def test_a_template_that_moves_the_system_message_splits_instead_of_refusing() -> None:
    tokenizer = tokenizer_of("mistral-v3")
    prompt = Prompt("p", (Message("system", "add"), *ASKED.messages))
    rollout = played(tokenizer, prompt=prompt)
    assert rollout.splits == len(TURNS) - 1
    last = replace(prompt, messages=(*prompt.messages, *said(TURNS, 0, 3)))
    assert rollout.sequences[-1].prefix.tokens_L.tolist() == render(last, tokenizer, READING)


def test_thinking_between_control_tokens_is_left_out_of_a_history() -> None:
    """No message may spell a control token, so a template could not find the thinking, and would show it as text."""
    tokenizer = tokenizer_of("qwen3")
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)
    rollout = played(tokenizer, ("[THINK]add[/THINK]3", *TURNS[1:]), history=1)
    shown = replace(ASKED, messages=(*ASKED.messages, *said(TURNS, 0, 1)))
    assert rollout.sequences[1].prefix.tokens_L.tolist() == render(shown, tokenizer, READING)


def test_what_cannot_be_rendered_is_refused_in_one_line() -> None:
    tokenizer = words()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a model with a chat template"):
        played(tokenizer, history=1)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 < 2 %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves out turns of the role 'user'"):
        played(tokenizer, history=1)


# --- and it is kept, cut and shared ---


def test_several_sequences_come_back_from_a_checkpoint_as_they_were(tmp_path: Any) -> None:
    tokenizer = words()

    class Reads:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def __call__(self, prompt: Prompt) -> TokenSequence:
            return TokenSequence.of(render(prompt, tokenizer, READING))

    visits = [(played(tokenizer, history=1), replace(played(tokenizer), member=1)), (played(tokenizer, history=0),)]
    cache, again, reads = RolloutCache(tmp_path), RolloutCache(tmp_path), Reads()
    cache.remember(visits, 9)
    again.restore([ASKED], reads, cache.tensors([ASKED]))  # type: ignore[arg-type]
    for one, two in zip([r for visit in visits for r in visit], [r for v in again.visits for r in v], strict=True):
        assert len(one.sequences) == len(two.sequences)
        for left, right in zip(one.sequences, two.sequences, strict=True):
            assert torch.equal(left.tokens_L, right.tokens_L)
            assert torch.equal(left.action_mask_L, right.action_mask_L)
        assert (one.histories, one.text, one.reward, one.status) == (two.histories, two.text, two.reward, two.status)
        assert torch.equal(one.turn_A, two.turn_A)  # type: ignore[arg-type]
        assert torch.equal(one.engine_logp_A, two.engine_logp_A)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", range(1, 10))
def test_a_cut_leaves_out_the_sequences_behind_it(steps: int) -> None:
    grown, anew = (played(words(), history=history) for history in (None, 2))
    short, expected = anew.cut(steps, "half"), grown.cut(steps, "half")
    assert short.action_ids == expected.action_ids
    assert (short.steps, short.status, short.text, short.outcomes) == (
        expected.steps, expected.status, expected.text, expected.outcomes
    )  # fmt: skip
    assert all(own.steps for own in short.sequences)
    assert short.histories == anew.histories[: len(short.sequences) - 1]


def test_a_share_weighs_all_sequences_of_an_episode() -> None:
    class Second(World):
        rank, size = 1, 2

    long, short = played(words(), history=9), played(words(), history=0)
    groups: list[Group] = [(replace(own, visit=visit),) for visit, own in enumerate([short, short, short, long])]
    assert long.tokens > 1.5 * short.tokens
    assert Share.of(groups, Second()).rollouts == range(3, 4)
    assert Share.of([(replace(short, visit=visit),) for visit in range(4)], Second()).rollouts == range(2, 4)


@pytest.mark.parametrize("wrong", ["histories", "a sequence without a decision"])
def test_sequences_and_histories_have_to_fit(wrong: str) -> None:
    rollout = played(words(), history=1)
    with pytest.raises(ValueError, match="histories for 4 sequences" if wrong == "histories" else "nothing is decided"):
        if wrong == "histories":
            replace(rollout, histories=rollout.histories[1:])
        else:
            sequences = (*rollout.sequences[:-1], rollout.sequences[-1].prefix)
            replace(rollout, sequences=sequences, turn_A=None, engine_logp_A=None)
    with pytest.raises(ValueError, match="read `sequences`"):
        rollout.sequence  # noqa: B018
