"""Stage times from measured rows, and what the simulator makes of them for runs that it was not fed with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster_model import Affine, Decode, Layout, Load, Stages, always
from cluster_sim import simulate
from cluster_stages import AHEAD, ONE, PLAN, TWO, WORKER, Setting

#: The rows of one round, by the key of their setting.
Rows = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Compared:
    """A run that was predicted, and measured: seconds of a step in each round, and the machine's load."""

    setting: Setting
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    loads: tuple[float, ...]

    @property
    def quietest(self) -> float:
        """The ratio of the round with the least load."""
        return min(zip(self.loads, self.ratios, strict=True))[1]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Predicted over measured, round by round."""
        return tuple(ours / true for ours, true in zip(self.predicted, self.measured, strict=True))

    @property
    def ratio(self) -> float:
        """The median over rounds."""
        return statistics.median(self.ratios)


def line(stage: str, one: Mapping[str, float], other: Mapping[str, float]) -> Affine:
    """A stage's seconds against tokens, through two points; never falling, and never below zero."""
    each = max(0.0, (other[stage] - one[stage]) / (other["tokens"] - one["tokens"]))
    return Affine(max(0.0, one[stage] - each * one["tokens"]), each)


def given(name: str, plan: Sequence[Setting] = (*PLAN, *AHEAD)) -> list[Setting]:
    """The runs of a deployment that the simulator is fed with, the smaller batch first."""
    own = (one for one in plan if one.name == name and not one.predicted and not one.staleness)
    return sorted(own, key=lambda one: one.prompts)


def fitted(rows: Rows, name: str) -> Stages:
    """Stage times of a deployment in one process, from its two smaller batches.

    Completions have one length here, so a batch's decode steps are part of what is always there.
    """
    one, other = (rows[setting.key] for setting in given(name))
    generate = line("generate", one, other)
    return Stages(
        decode=Decode(start=generate.fixed, row=generate.each),
        teacher=line("teacher", one, other),
        learn=line("learn", one, other),
        besides=line("besides", one, other),
    )


def seconds(setting: Setting, stages: Stages, row: Mapping[str, float]) -> float:
    """What the simulator says of a step of a run; of its row only the length of completions is used."""
    length = max(1, round(row["tokens"] / setting.prompts))
    layout = Layout(
        setting.ranks, setting.workers, setting.prompts, int(setting.served), staleness=setting.staleness, ask="step"
    )
    return simulate(layout, stages, Load(setting.prompts, 1, 0, always(length)), steps=8).seconds


def for_ranks(rows: Rows) -> Stages:
    """Those of one process, and what two ranks exchange: what a step of a small batch takes beyond that."""
    stages = fitted(rows, ONE)
    (small,) = given(TWO)
    row = rows[small.key]
    return replace(stages, exchange=max(0.0, row["whole"] - seconds(small, stages, row)))


def for_ahead(rows: Rows, plan: Sequence[Setting] = AHEAD) -> Stages:
    """Those of a process that generates besides; the trainer hands out its weights while nobody waits for them."""
    stages = fitted(rows, WORKER)
    (small,) = (one for one in plan if one.staleness and not one.predicted)
    keep = rows[small.key]["keep"]
    decode = replace(stages.decode, start=max(0.0, stages.decode.start - keep))
    return replace(stages, keep=keep, decode=decode)


def stages_of(setting: Setting, rows: Rows) -> Stages:
    """What a run that is predicted is made of."""
    if setting.staleness:
        return for_ahead(rows)
    return for_ranks(rows) if setting.ranks > 1 else fitted(rows, setting.name)


def compared(rounds: Sequence[Mapping[str, Any]], plan: Sequence[Setting] = (*PLAN, *AHEAD)) -> list[Compared]:
    """Every run that was left out of the fit: predicted from the other rows of the same round."""
    found = []
    for setting in (one for one in plan if one.predicted):
        own = [one for one in rounds if setting.key in one["runs"]]
        ours, true = [], []
        for rows in (one["runs"] for one in own):
            ours.append(seconds(setting, stages_of(setting, rows), rows[setting.key]))
            true.append(rows[setting.key]["whole"])
        if own:
            found.append(Compared(setting, tuple(ours), tuple(true), tuple(one["load"] for one in own)))
    return found
