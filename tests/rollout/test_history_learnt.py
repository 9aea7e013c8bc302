"""Episodes of several sequences are scored and learnt from as a plain loop over their sequences would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from talks import ASKED, READING, TURNS, played

from retort.align.chat import render
from retort.align.pair import SameIds
from retort.core.needs import DENSE
from retort.core.rollouts import Message, Pack, Prompt, Rollout, in_groups
from retort.models.load import load_model
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View
from retort.train.setup.prepare import Prepared

OTHERS = ("and", "3 4 5", "so", "9")


@pytest.fixture
def setup(model_folder: Callable[..., Path], tiny_run: dict[str, Any]) -> Prepared:
    student = model_folder(seed=1, eos="<|im_end|>", chat=True)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=64, eos="<|im_end|>", chat=True)
    return pipeline.prepared({**tiny_run, "student": str(student), "teacher": str(teacher)}, "eopd")


def pack(setup: Prepared, history: int | None) -> Pack:
    """Two episodes, and a completion of one turn."""
    tokenizer = setup.student.tokenizer
    episodes = [played(tokenizer, turns, history=history) for turns in (TURNS, OTHERS)]
    rollouts = [replace(own, member=member, reward=float(member)) for member, own in enumerate(episodes)]
    single = Rollout(replace(ASKED, id="s"), rollouts[1].sequences[0].cut(2), reward=0.5)
    return Pack.of([rollouts[0], single, rollouts[1]])


def same(one: pipeline.Step, other: pipeline.Step, tolerance: float) -> None:
    assert one.loss == pytest.approx(other.loss, rel=tolerance)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        largest = float(other.gradients[name].abs().max())
        torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-3, atol=tolerance * max(largest, 1e-6))


def test_all_of_a_history_is_the_loss_of_a_growing_conversation(setup: Prepared) -> None:
    grown, anew = pack(setup, None), pack(setup, len(TURNS))
    assert (len(grown.sequences), len(anew.sequences)) == (3, 9)
    (one, *_), (two, *_) = (pipeline.as_run(setup, own, 10**6) for own in (grown, anew))
    same(two, one, 1e-5)


@pytest.mark.parametrize("batch_tokens", [10**6, 40, 1])
def test_a_short_history_is_the_loss_of_its_sequences_each_by_itself(setup: Prepared, batch_tokens: int) -> None:
    """The plain way: a padded pass over the sequences, and the definition of the loss over the rollouts."""
    anew = pack(setup, 1)
    plain = pipeline.by_padding(setup, anew)
    for step in pipeline.as_run(setup, anew, batch_tokens):
        same(step, plain, 1e-4)
    other = pipeline.as_run(setup, pack(setup, None), 10**6)[0]
    assert abs(other.loss - plain.loss) > 1e-6, "the history changes nothing, so that this says nothing"


def test_micro_batches_are_of_sequences_so_that_a_long_episode_needs_no_more_memory(setup: Prepared) -> None:
    anew = pack(setup, 1)
    passes = pipeline.cut_to(setup, 40).learner.passes
    batches = passes.micro_batches(anew, [2, 0])
    assert sorted(place for batch in batches for place in batch) == anew.sequences_of([0, 2])
    assert max(sum(len(anew.sequences[place]) for place in batch) for batch in batches) <= 40
    assert anew.rollouts[0].tokens > 40


def test_a_view_takes_the_place_of_the_first_prompt_before_every_sequence(model_folder: Callable[..., Path]) -> None:
    folder = model_folder(seed=2, eos="<|im_end|>", chat=True)
    lm = load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"))
    teacher = LocalTeacher(lm, alignment=SameIds(50), batch_tokens=64)
    rollout, shown = played(lm.tokenizer, history=1), Prompt("q", (Message("user", "the answer is 7 and"),))
    for view, first in ((View(render=lambda scene: shown), shown), (View(), ASKED)):
        said = teacher.score(in_groups([rollout]), ScoreRequest(view, frozenset({DENSE})))
        found: list[torch.Tensor] = []
        for sequence, history in zip(rollout.sequences, ((), *rollout.histories), strict=True):
            before = render(replace(first, messages=(*first.messages, *history)), lm.tokenizer, READING)
            ids = torch.tensor([*before, *sequence.continuation.tokens_L.tolist()])
            with torch.no_grad():
                logits_LV = lm.model(input_ids=ids[None]).logits[0, :, :50]
            found.append(logits_LV[len(before) - 1 : -1].log_softmax(-1))
        torch.testing.assert_close(said.rows(slice(None)).logp_NV, torch.cat(found), rtol=1e-4, atol=1e-4)
