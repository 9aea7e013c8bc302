"""Reading candidates in place of decisions: a sequence once, and beside it one token for each. Axes: `retort.core`.

B branches are all candidates at all forks of some sequences. By definition a branch is everything before its fork and
the candidate, as a sequence of its own. Where a model takes a mask of its own, a sequence is read once and all of its
candidates after it in the same row: each at the place of its fork, seeing what is before that and itself. Whether a
family can be read so is tried, as in `retort.models.together`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel

#: A row is read instead of branches where it saves this factor of tokens; a row is a pass of its own.
WORTH = 2
#: Whether rows gave what branches give, by model; one that is not here has not been tried yet.
TRIED = WeakKeyDictionary[LanguageModel, bool]()


@dataclass(frozen=True)
class Fork:
    """Candidates in place of one token.

    Attributes:
        at: Index of the token in its sequence, at least 1.
        ids: The candidates, in the model's ids.
    """

    at: int
    ids: tuple[int, ...]


def branch_states(
    lm: LanguageModel, sequences: Sequence[TokenSequence], forks: Sequence[Sequence[Fork]], budget: int
) -> Tensor:
    """The last hidden state after each candidate, [B, D], without gradient; sequence by sequence, fork by fork.

    Args:
        lm: The model.
        sequences: What is read.
        forks: Those of each sequence.
        budget: Tokens per forward pass.
    """
    rows = [_in_row(lm, own, there) for own, there in zip(sequences, forks, strict=True)]
    alone = [
        made for own, there, row in zip(sequences, forks, rows, strict=True) if not row for made in branches(own, there)
    ]
    # Asked also where there are none: of several ranks that share the weights, all make as many passes.
    apart_BD = lm.all_hidden(alone, budget)[1::2]  # each has two decisions, of which the first is the candidate itself
    found, start = list[Tensor](), 0
    for own, there, row in zip(sequences, forks, rows, strict=True):
        count = sum(len(fork.ids) for fork in there)
        found.append(_row_states(lm, own, there, budget) if row else apart_BD[start : start + count])
        start += 0 if row else count
    return torch.cat([apart_BD[:0], *found])


def branches(sequence: TokenSequence, forks: Sequence[Fork]) -> list[TokenSequence]:
    """A sequence for each candidate: all before the fork, the candidate, and one token more, whose scores are read.

    Only these two are decisions, so that the branches of a fork begin with one prompt, which a row computes once.
    """
    return [sequence.part(0, fork.at).read().then([own, own], decided=True) for fork in forks for own in fork.ids]


def _in_row(lm: LanguageModel, sequence: TokenSequence, forks: Sequence[Fork]) -> bool:
    """Whether a sequence is read in a row with its candidates."""
    if not forks or not lm.here or lm.sharding.on or sequence.media or lm.rereads_from is not None:
        return False
    read = max(fork.at for fork in forks) + sum(len(fork.ids) for fork in forks)
    by_branches = sum(fork.at + 2 * len(fork.ids) for fork in forks)
    if by_branches < WORTH * read or (lm.together_up_to is not None and read > lm.together_up_to):
        return False
    if lm not in TRIED:
        TRIED[lm] = _can(lm)
    return TRIED[lm]


def _can(lm: LanguageModel) -> bool:
    """Whether rows give what branches give, to rounding."""
    ids = ((torch.arange(14) * 7 + 1) % lm.rows).tolist()
    sequence = TokenSequence.of(ids)
    forks = [Fork(at, (ids[at - 1], ids[-at])) for at in (3, 9, 12)]
    with torch.no_grad():
        apart_BD = lm.alone(branches(sequence, forks))[1::2].float()
        try:
            found_BD = _row_states(lm, sequence, forks, 1000).float()
        except Exception:  # a family may fail in any way on a mask that it does not expect
            return False
    apart_B = (found_BD - apart_BD).norm(dim=1) / apart_BD.norm(dim=1).clamp_min(1e-6)
    return bool((apart_B < (1e-3 if lm.precision == "fp32" else 5e-2)).all())


def _row_states(lm: LanguageModel, sequence: TokenSequence, forks: Sequence[Fork], budget: int) -> Tensor:
    """The states of all candidates of one sequence, with as many of them in a row as the budget, or its length, has."""
    single = [(fork.at, own) for fork in forks for own in fork.ids]
    read = max(at for at, _ in single)
    most = max(budget - read, read)
    found = [_one_row(lm, sequence.tokens_L[:read], single[i : i + most]) for i in range(0, len(single), most)]
    return torch.cat(found)


def _one_row(lm: LanguageModel, tokens_L: Tensor, candidates: Sequence[tuple[int, int]]) -> Tensor:
    length, count, device = len(tokens_L), len(candidates), lm.device
    at_B = torch.tensor([at for at, _ in candidates])
    ids_T = torch.cat([tokens_L, torch.tensor([own for _, own in candidates])]).to(device)
    position_T = torch.cat([torch.arange(length), at_B]).to(device)
    sees_TT = torch.zeros(length + count, length + count, dtype=torch.bool)
    sees_TT[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    sees_TT[length:, :length] = torch.arange(length) < at_B[:, None]
    sees_TT[length:, length:] = torch.eye(count, dtype=torch.bool)
    with torch.inference_mode(), lm.offload.kept(), lm.compute():
        said = lm.model.base_model(
            input_ids=ids_T[None],
            position_ids=position_T[None],
            attention_mask=sees_TT[None, None].to(device),
            use_cache=False,
        )
        states_BD = said.last_hidden_state[0, length:]
    return states_BD.clone()
