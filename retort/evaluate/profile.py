"""Where a model's entropy and its disagreement with the teacher lie: by size, by place in the completion, by turn.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Lower ends of the bins of entropy, nats; the last one has no upper end.
ENTROPY_BINS = tuple(round(0.1 * index, 1) for index in range(126))  # 12.5 is more than ln(262,144)
#: Turns of an episode that are told apart, here and in curves; later ones count to the last of these.
TURNS = 32
#: What is averaged in each bin, where it could be measured.
AVERAGED = ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")


def position_bins(longest: int) -> list[int]:
    """Lower ends of the bins of a token's position in its completion, from 0.

    Completions of up to 24 tokens have a bin for each position; longer ones have two bins per octave, because the
    beginning of a completion and its end are both worth seeing.
    """
    if longest <= 24:
        return list(range(longest))
    octaves = {round(2 ** (half / 2)) for half in range(2 * math.ceil(math.log2(longest)))}
    return [0, *sorted(lower for lower in octaves if lower < longest)]


@dataclass
class Profile:
    """Sums over all tokens of a model's completions.

    Attributes:
        longest: Tokens of the longest possible completion.
    """

    longest: int
    _histograms: dict[str, Tensor] = field(default_factory=dict)
    _sums: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor], position_N: Tensor, turn_N: Tensor | None = None) -> None:
        """Adds some tokens.

        Args:
            values: Measures by name, [N] each, nats.
            position_N: Position of each token in its completion.
            turn_N: Turn of each token in its episode, from 0; None where all have one.
        """
        bin_N = _bins(position_N.double(), position_bins(self.longest))
        positions = len(position_bins(self.longest))
        kept = {name: values[name].double().cpu() for name in AVERAGED if name in values}
        for name in ("student_entropy", "teacher_entropy"):
            if name in kept:
                count = torch.bincount(_bins(kept[name], ENTROPY_BINS), minlength=len(ENTROPY_BINS))
                self._histograms[name] = self._histograms.get(name, torch.zeros_like(count)) + count
        for name, values_N in kept.items():
            self._average("position", name, values_N, bin_N, positions)
            if turn_N is not None:
                self._average("turn", name, values_N, turn_N.cpu().clamp(max=TURNS - 1), TURNS)
            if "teacher_entropy" in kept:
                inside_N = _bins(kept["teacher_entropy"], ENTROPY_BINS)
                self._average("teacher_entropy", name, values_N, inside_N, len(ENTROPY_BINS))

    def _average(self, axis: str, name: str, values_N: Tensor, bin_N: Tensor, bins: int) -> None:
        total, count = torch.zeros(bins, dtype=torch.float64), torch.bincount(bin_N, minlength=bins)
        total.index_add_(0, bin_N, values_N)
        old_total, old_count = self._sums.get((axis, name), (torch.zeros_like(total), torch.zeros_like(count)))
        self._sums[axis, name] = (old_total + total, old_count + count)

    def plain(self) -> dict[str, Any]:
        """For `eval.json`.

        `histogram`: tokens in each bin of entropy, for the writer and for the teacher. `by_position`,
        `by_teacher_entropy` and, of episodes of several turns, `by_turn` (from 1; the last one holds all later turns):
        mean of each measure in each bin, nats; null where no token fell or it is infinite.
        `from` holds the lower ends of the bins, `tokens` how many fell into each.
        """
        found: dict[str, Any] = {"histogram": {"from": list(ENTROPY_BINS)}}
        found["histogram"] |= {name: count.tolist() for name, count in self._histograms.items()}
        ends = {"position": position_bins(self.longest), "teacher_entropy": list(ENTROPY_BINS)}
        if (turns := self._turns()) > 1:
            ends["turn"] = list(range(1, turns + 1))
        for axis, lower in ends.items():
            columns = {name: sums for (of, name), sums in self._sums.items() if of == axis}
            if columns:
                tokens = next(iter(columns.values()))[1][: len(lower)].tolist()
                means = {name: _means(total, count)[: len(lower)] for name, (total, count) in columns.items()}
                found[f"by_{axis}"] = {"from": lower, "tokens": tokens, **means}
        return found

    def _turns(self) -> int:
        """Turns of the longest episode, `TURNS` at most."""
        counts = [count for (axis, _), (_, count) in self._sums.items() if axis == "turn"]
        return max((int(count.count_nonzero()) for count in counts), default=0)


def _bins(values_N: Tensor, lower: Sequence[float]) -> Tensor:
    """The bin of each value; an end belongs to the bin above it."""
    ends = torch.tensor(lower[1:], dtype=torch.float64)
    return torch.bucketize(values_N.cpu(), ends, right=True)


def _means(total: Tensor, count: Tensor) -> list[float | None]:
    means = (total / count).tolist()
    return [round(mean, 6) if math.isfinite(mean) else None for mean in means]
