"""Candidates in place of tokens: a row gives what branches give, where it is worth it and the model can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.models import branches
from retort.models.branches import Fork, branch_states
from retort.models.lm import LanguageModel
from retort.models.load import load_model

LENGTH = 40


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> LanguageModel:
    return load_model(str(model_folder(seed=3)), role="teacher", precision="fp32", device=torch.device("cpu"))


def given() -> tuple[list[TokenSequence], list[list[Fork]]]:
    """A long sequence with a dozen forks, one without any, and one with a single fork, which is no row's worth."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (LENGTH + 9,), generator=draw).tolist()
    long, none, short = (TokenSequence.of(own) for own in (ids[:LENGTH], ids[:4], ids[LENGTH:]))
    forks = [Fork(at, tuple(torch.randint(5, 60, (6,), generator=draw).tolist())) for at in range(4, LENGTH, 3)]
    return [long, none, short], [forks, [], [Fork(5, (7, 8))]]


def plain(lm: LanguageModel, sequences: list[TokenSequence], forks: list[list[Fork]]) -> Tensor:
    """Of every branch alone, by the model."""
    found = []
    with torch.no_grad():
        for own, there in zip(sequences, forks, strict=True):
            for fork in there:
                for candidate in fork.ids:
                    ids = torch.tensor([[*own.ids[: fork.at], candidate]])
                    found.append(lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize(("budget", "rows"), [(1000, [72]), (45, [37, 35])], ids=["one row", "two rows"])
def test_rows_are_the_branches(
    lm: LanguageModel, budget: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, forks = given()
    read = list[int]()
    row = branches._one_row  # type: ignore[attr-defined]
    monkeypatch.setattr(branches, "_one_row", lambda *args: read.append(len(args[2])) or row(*args))
    branches.TRIED[lm] = True
    found = branch_states(lm, sequences, forks, budget)
    torch.testing.assert_close(found, plain(lm, sequences, forks), rtol=1e-4, atol=1e-5)
    assert read == rows, "the long one in a row, the short one by branches"


def test_a_model_that_cannot_is_found_out_and_read_by_branches(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, forks = given()
    expected = plain(lm, sequences, forks)
    branches.TRIED.pop(lm, None)
    branch_states(lm, sequences, forks, 1000)
    assert branches.TRIED[lm]

    def blind(*args: object) -> Tensor:
        return torch.zeros(len(args[2]), expected.shape[1])  # type: ignore[arg-type]

    monkeypatch.setattr(branches, "_one_row", blind)
    del branches.TRIED[lm]
    torch.testing.assert_close(branch_states(lm, sequences, forks, 1000), expected, rtol=1e-4, atol=1e-5)
    assert not branches.TRIED[lm]


def test_nothing_to_read_is_nothing(lm: LanguageModel) -> None:
    assert branch_states(lm, [], [], 1000).shape == (0, lm.head().weight_VD.shape[1])
    assert branch_states(lm, given()[0], [[], [], []], 1000).shape == (0, lm.head().weight_VD.shape[1])
