"""What a step's record and metrics say about the units of a teacher with another tokenizer.

Axis letters: see `retort.core`; F counts units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retort.core.losses import times
from retort.core.rollouts import Pack, Rollout, Status
from retort.loss.terms import UNITS, counted
from retort.method import Term
from retort.teachers.base import Teacher
from retort.teachers.spanned import SpanTeacher
from retort.train.learning.passes import Batch

__all__ = ["single_steps", "unit_metrics", "unit_rows"]


def single_steps(sizes_N: Tensor) -> tuple[Tensor, Tensor]:
    """The steps in units of one token on each side, and those in longer units, bool [N] each.

    Args:
        sizes_N: The units as one column, see `Units.sizes_C`; those of several rollouts follow one another.
    """
    inside_N, begins_N = ~sizes_N.isnan(), sizes_N > 0
    unit_N = (begins_N.cumsum(0) - 1)[inside_N]
    own_F = torch.bincount(unit_N, minlength=int(begins_N.sum()))
    single_F = (own_F == 1) & (sizes_N[begins_N] == 1)
    single_N = inside_N.clone().masked_scatter(inside_N, single_F[unit_N])
    return single_N, inside_N & ~single_N


def unit_metrics(batch: Batch, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of a step that only a teacher with another tokenizer has; a mean over nothing is left out.

    `unit_loss/<term>/one_to_one` and `unit_loss/<term>/spans`: the term, with its weight and before its coefficient,
    over the student's tokens in units of one token on each side, and in longer ones. `stop_probability/student` and
    `stop_probability/<view>`: each side's probability of stopping where the student stopped, over its completions.

    Args:
        batch: The scored rollouts.
        values: Values of the first pass over their steps by name, [N] each.
    """
    found: dict[str, float] = {}
    for view in batch.method.views:
        sizes_N = values.get(f"{view}{UNITS}")
        if sizes_N is None:
            continue
        counted_N = counted(batch.method, batch.valid, len(batch.steps))
        for term in batch.method.terms:
            if term.against == view:
                found |= _losses(term, values, sizes_N, counted_N[term.name])
        ends = torch.tensor(_ends(batch.pack, sizes_N), dtype=torch.long)
        if len(ends):
            for side in ("student", view):
                found[f"stop_probability/{side}"] = float(values[f"{side}_logp"][ends].double().exp().mean())
    return found


def _losses(term: Term, values: Mapping[str, Tensor], sizes_N: Tensor, counted_N: Tensor) -> dict[str, float]:
    loss_N = times(values[f"{term.name}.weight"].double(), values[f"{term.name}.value"].double())
    kinds = zip(("one_to_one", "spans"), single_steps(sizes_N), strict=True)
    chosen = {kind: loss_N[inside_N & counted_N] for kind, inside_N in kinds}
    return {f"unit_loss/{term.name}/{kind}": float(own.mean()) for kind, own in chosen.items() if len(own)}


def _ends(pack: Pack, sizes_N: Tensor) -> list[int]:
    """The steps in N at which the student chose to stop, and which the teacher read as its own stop."""
    last_R = torch.bincount(pack.steps.rollout_N, minlength=len(pack.rollouts)).cumsum(0) - 1
    ended = [r.source == "student" and r.status == Status.COMPLETED and r.steps > 0 for r in pack.rollouts]
    steps: list[int] = last_R[torch.tensor(ended)].tolist()
    return [step for step in steps if sizes_N[step] > 0]


def unit_rows(
    rollout: Rollout, columns: Mapping[str, Tensor], teachers: Mapping[str, Teacher]
) -> dict[str, dict[str, Any]]:
    """The units of a rollout by view, as JSON values; empty where all teachers have the student's tokenizer.

    `sizes` is `Units.sizes_C` as whole numbers, null outside of all units; `tokens` are the texts of the teacher's
    tokens in these units, in order.

    Args:
        rollout: The rollout.
        columns: Values of its decided tokens by name, [A] each.
        teachers: The teacher of each view.
    """
    found: dict[str, dict[str, Any]] = {}
    for view, teacher in teachers.items():
        if isinstance(teacher, SpanTeacher) and f"{view}{UNITS}" in columns:
            sizes = [None if size != size else int(size) for size in columns[f"{view}{UNITS}"].tolist()]
            read = rollout.sequences if any(size is not None for size in sizes) else ()
            tokens = [token for sequence in read for token in teacher.spelt(sequence)]
            # What the teacher's context did not hold comes last.
            found[view] = {"sizes": sizes, "tokens": tokens[: sum(size or 0 for size in sizes)]}
    return found
