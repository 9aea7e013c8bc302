"""LGR: the reward by hand, where it is given, and a look ahead against plain passes of the teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from torch import Tensor
from toy import Toy

import retort
from retort import config
from retort.core.losses import TokenLosses
from retort.core.needs import Need
from retort.core.rollouts import in_groups
from retort.core.signals import Ahead, Dense
from retort.errors import SignalError, UserError
from retort.functional import token_losses
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.train.setup.prepare import prepare

F64 = torch.float64
#: Nearly uniform over three ids, at 1.05 nats.
LOGITS = torch.tensor([0.4, 0.4, 0.2], dtype=F64).log()


def losses(sure: list[list[float]], tokens: list[int], **settings: Any) -> TokenLosses:
    """Student and teacher are alike, so that the reward alone is left; candidates are the first ids in order."""
    tokens_N, sure_NK = torch.tensor(tokens), torch.tensor(sure, dtype=F64)
    k = sure_NK.shape[1]
    logits_NV = LOGITS.expand(len(tokens), -1)
    ids_NK = torch.arange(k).expand(len(tokens), -1)
    teacher = Ahead.beside(Dense.of(logits_NV, tokens_N), ids_NK, sure_NK)
    method = retort.load("lgr", top_k=k, **settings)
    return token_losses(method, student_logits=logits_NV, teacher_logits=teacher, tokens=tokens_N)


def test_golden_numbers() -> None:
    """Confidences of .9, .5, .1: a mean of .5, a deviation of .4 sqrt(2 / 3)."""
    found = -losses([[0.9, 0.5, 0.1]] * 3, [0, 1, 2], coef=1.5).terms["reverse"].value
    deviation = 0.4 * math.sqrt(2 / 3)
    wanted = [1.5 * 0.4 / (deviation + 1e-6), 0.0, -1.5 * 0.4 / (deviation + 1e-6)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_where_the_teacher_did_not_look_there_is_no_reward() -> None:
    nan = math.nan
    found = losses([[0.9, 0.1], [nan, nan], [0.9, nan], [0.9, 0.1]], [0, 0, 0, 2]).terms["reverse"].value
    assert found[0].item() == pytest.approx(-1.0, abs=1e-4)
    assert found[1:].tolist() == [0.0, 0.0, 0.0], "not asked; nothing to compare with; a token that is no candidate"


def test_a_certain_student_gets_no_reward() -> None:
    assert losses([[0.9, 0.1]], [0], entropy_threshold=1.06).loss.item() == 0.0
    assert losses([[0.9, 0.1]], [0], entropy_threshold=1.05).loss.item() == pytest.approx(-1.0, abs=1e-4)


def test_a_teacher_that_cannot_look_ahead_is_refused() -> None:
    toy = Toy()
    with pytest.raises(UserError, match="a look one token ahead after the student's top-8"):
        token_losses("lgr", student_logits=toy.logits, teacher_logits=toy.teacher_logits, tokens=toy.tokens)
    assert retort.load("lgr", coef=0.0).needs().isdisjoint({Need("lookahead", 8, "student")})


def test_a_cache_alone_is_no_teacher_that_looks_ahead(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named = {**tiny_run, "method": {"name": "lgr"}, "cache": {"dir": str(tmp_path), "only": True}}
    with pytest.raises(UserError, match="method 'lgr' reads candidates that are not stored") as caught:
        prepare(config.resolve(named))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [0, 1])
def test_one_candidate_is_no_group(k: int) -> None:
    with pytest.raises(UserError, match="k must be at least 2"):
        retort.load("lgr", top_k=k)


def plain(teacher: LocalTeacher, prefix: list[int], candidate: int, vocab: int) -> float:
    """The largest probability after a candidate, by one pass of the model over one sequence."""
    said = teacher.lm.model(input_ids=torch.tensor([[*prefix, candidate]]), use_cache=False).logits[0, -1, :vocab]
    return float(said.softmax(-1).max())


@pytest.mark.parametrize("turns", [None, pipeline.TURNS], ids=["one turn", "episodes"])
def test_a_look_ahead_is_a_pass_over_every_branch(tiny_run: dict[str, Any], turns: Any) -> None:
    setup = pipeline.prepared(tiny_run, "lgr")
    pack = pipeline.ragged(setup, turns)
    teacher, vocab = setup.teachers.models["teacher"], setup.learner.vocab
    assert isinstance(teacher, LocalTeacher)
    draw = torch.Generator().manual_seed(1)
    ids_NK = torch.rand(len(pack), vocab, generator=draw).topk(3).indices
    chosen_N = torch.rand(len(pack), generator=draw) > 0.4
    needs = frozenset({Need("lookahead", 3, "student"), Need("sampled")})
    request = ScoreRequest(setup.method.views["teacher"], needs, 1.0, ids_NK, chosen_N)
    found = teacher.score(in_groups(pack.rollouts), request)
    assert isinstance(found, Ahead)
    assert {"lookahead", "sampled"} <= found.offers
    expected_NK = torch.full(ids_NK.shape, math.nan, dtype=F64)
    place = 0
    with torch.no_grad():
        for sequence in pack.sequences:
            for at in sequence.action_mask_L.nonzero().flatten().tolist():
                if chosen_N[place]:
                    prefix = sequence.tokens_L[:at].tolist()
                    expected_NK[place] = torch.tensor(
                        [plain(teacher, prefix, own, vocab) for own in ids_NK[place].tolist()], dtype=F64
                    )
                place += 1
    torch.testing.assert_close(found.confidence_NK.double(), expected_NK, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_run_looks_ahead_only_where_the_student_is_uncertain(tiny_run: dict[str, Any]) -> None:
    """The branches are those of steps above the threshold; everywhere else no number is read, so losses are alike."""
    setup = pipeline.prepared(tiny_run, "lgr")
    pack = pipeline.ragged(setup)
    groups, learner, method = in_groups(pack.rollouts), setup.learner, setup.method
    entropy_N = learner.entropies(method, groups)
    above = float(entropy_N.median())
    limited = retort.load("lgr", entropy_threshold=above)
    looked = {}
    for told in (None, lambda: learner.entropies(limited, groups)):
        signal = setup.teachers.score(
            limited, groups, setup.teachers.wanted(limited), lambda k: learner.top_ids(limited, groups, k), told
        )["teacher"]
        assert isinstance(signal, Ahead)
        looked[told is None] = signal
    asked_N = ~looked[False].confidence_NK.isnan().any(-1)
    assert torch.equal(asked_N, entropy_N > above)
    assert not looked[True].confidence_NK.isnan().any()

    def loss(signal: Ahead) -> Tensor:
        logits_NV = pipeline.student_logits(setup, pack)
        given = {"student_logits": logits_NV, "tokens": pack.steps.tokens_N, "rollouts": pack.steps.rollout_N}
        return token_losses(limited, teacher_logits=signal, **given).loss

    torch.testing.assert_close(loss(looked[False]), loss(looked[True]), rtol=1e-6, atol=1e-9)


def test_numbers_that_are_no_probabilities_are_refused() -> None:
    tokens = torch.tensor([0])
    signal = Dense.of(LOGITS[None], tokens)
    with pytest.raises(SignalError, match="no probability"):
        Ahead.beside(signal, torch.tensor([[0, 1]]), torch.tensor([[0.5, 1.5]]))
    with pytest.raises(SignalError, match="must be .N, K. both"):
        Ahead.beside(signal, torch.tensor([[0, 1]]), torch.tensor([[0.5]]))
