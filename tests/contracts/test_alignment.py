"""What every alignment of a student and a teacher must do; a new kind is one line in `ALIGNMENTS`."""

from __future__ import annotations

import pytest
import torch

from retort.align.pair import Alignment, IdMap, SameIds
from retort.align.stops import StopMap
from retort.core.sequences import TokenSequence
from retort.errors import SignalError, UserError

STOPS = StopMap({2: 4, 4: 2}, (3,), 2)
OTHER = torch.tensor([3, 5, 0, 1, 4, 2])
LACKING = torch.tensor([3, 6, 0, 1, 4, -1])
ALIGNMENTS: dict[str, Alignment] = {
    "same ids": SameIds(6),
    "same ids, other stops": SameIds(6, STOPS),
    "id map": IdMap(OTHER, 6),
    "id map, other stops": IdMap(OTHER, 6, STOPS),
    "id map, one id lacking": IdMap(LACKING, 7),
}


@pytest.fixture(params=ALIGNMENTS)
def alignment(request: pytest.FixtureRequest) -> Alignment:
    return ALIGNMENTS[request.param]


def theirs(alignment: Alignment) -> dict[int, int]:
    """The teacher's id of each id of the student's, stops left as they are; by nothing but `ours`."""
    return {ours: i for i, ours in enumerate(alignment.to_student(range(alignment.width))) if ours >= 0}


def sequence() -> TokenSequence:
    """Two turns of which the environment wrote the middle; the stop is decided in one and only read in the other."""
    return TokenSequence.of([0, 2]).then([3, 2], decided=True).then([2, 1, 4]).then([4], decided=True)


def test_what_is_read_is_the_same_tokens_and_stops_are_the_teachers_only_where_decided(alignment: Alignment) -> None:
    read, ids, swap = alignment.read(sequence()), theirs(alignment), alignment.stops.swap
    assert torch.equal(read.action_mask_L, sequence().action_mask_L)
    expected = [
        ids[swap.get(token, token) if decided else token]
        for token, decided in zip(sequence().tokens_L.tolist(), sequence().action_mask_L.tolist(), strict=True)
    ]
    assert read.tokens_L.tolist() == expected


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_probability_is_at_the_students_id_of_its_token(alignment: Alignment, temperature: float) -> None:
    draw = torch.Generator().manual_seed(3)
    logits_CW = torch.randn(4, alignment.width, generator=draw, dtype=torch.float64)
    p_CW = (logits_CW / temperature).softmax(-1)
    found_CV = alignment.logits(logits_CW.clone(), temperature)
    assert found_CV.shape == (4, alignment.vocab)
    ids, stops = theirs(alignment), alignment.stops
    p_CV = torch.zeros(4, alignment.vocab, dtype=torch.float64)
    for ours, other in ids.items():
        p_CV[:, stops.swap.get(ours, ours)] = p_CW[:, other]
    p_CV /= p_CV.sum(-1, keepdim=True)
    for merged in stops.merged:
        p_CV[:, stops.into] += p_CV[:, merged]
        p_CV[:, merged] = 0
    torch.testing.assert_close((found_CV / temperature).softmax(-1), p_CV, rtol=1e-5, atol=2e-6)
    lacking = [i for i in range(alignment.vocab) if i not in ids]
    assert bool((found_CV[:, lacking] == -torch.inf).all())
    assert bool(found_CV[:, list(ids)].isfinite().all())


@pytest.mark.parametrize("ids", [slice(0, 6), slice(0, 3), slice(3, 6), slice(2, 3), slice(5, 6)])
def test_some_columns_are_those_of_all(alignment: Alignment, ids: slice) -> None:
    """A rank that holds some of the ids asks for no more of the teacher's than these and the stops."""
    logits_CW = torch.randn(4, alignment.width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted_CV = alignment.logits(logits_CW.clone(), 2.0)
    found_CK = alignment.logits_of(lambda theirs: logits_CW[:, theirs].clone(), ids, 2.0)
    assert torch.equal(found_CK, wanted_CV[:, ids])


def test_what_the_teacher_wrote_is_read_by_itself_as_it_is(alignment: Alignment) -> None:
    own = alignment.itself()
    assert own.vocab == own.width == alignment.width and not own.stops
    assert torch.equal(own.read(sequence()).tokens_L, sequence().tokens_L)


def test_other_stops_leave_the_ids(alignment: Alignment) -> None:
    assert theirs(alignment.with_stops(STOPS)) == theirs(alignment)
    assert alignment.with_stops(STOPS).stops is STOPS


def test_a_token_without_an_id_is_refused_and_not_read_as_another() -> None:
    lacking = ALIGNMENTS["id map, one id lacking"]
    for token in (5, 6):  # one without, and one beyond all
        with pytest.raises(SignalError, match=f"no id for the student's token id {token}"):
            lacking.read(TokenSequence.of([0, token]))


def test_fewer_ids_are_the_first_ones_or_refused() -> None:
    assert ALIGNMENTS["same ids, other stops"].for_vocab(5).vocab == 5
    assert ALIGNMENTS["id map"].for_vocab(6).vocab == 6
    with pytest.raises(UserError, match="share only 5 ids, and a teacher that has other ids .* is about all 6"):
        ALIGNMENTS["id map"].for_vocab(5)


def test_the_digest_is_the_same_for_alignments_that_do_the_same() -> None:
    again = {
        "same ids": SameIds(6),
        "same ids, other stops": SameIds(6, StopMap({4: 2, 2: 4}, (3,), 2)),
        "id map": IdMap(OTHER.clone(), 6),
        "id map, other stops": IdMap(OTHER.clone(), 6, STOPS),
        "id map, one id lacking": IdMap(LACKING.clone(), 7),
    }
    assert {name: own.digest for name, own in again.items()} == {name: own.digest for name, own in ALIGNMENTS.items()}
    assert len({own.digest for own in ALIGNMENTS.values()}) == len(ALIGNMENTS)
    assert SameIds(5).digest != SameIds(6).digest
