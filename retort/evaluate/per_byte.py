"""The divergence from a teacher in nats per byte of text: models with any two tokenizers have bytes in common.

Axis letters: see `retort.core`. A unit is a run of the writer's tokens and a run of the teacher's that spell the same
bytes (`retort.core.signals.units`); with one tokenizer every token is a unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from retort.align.pieces import piece_table, pieces
from retort.core.context import Context
from retort.core.rollouts import Pack
from retort.errors import SignalError
from retort.models.lm import LanguageModel

#: Names of the two measures in `eval.json`.
PER_BYTE, IN_UNITS = "reverse_kl_per_byte", "bytes_in_units"
_GAP, _INSIDE = "sampled_reverse_kl", "in_unit"


def against_units(context: Context) -> dict[str, Tensor]:
    """The writer and a teacher with another tokenizer, [N] each.

    Returns:
        `student_logp` and `student_entropy` as for any teacher; `in_unit`, 1 at steps that are part of a unit, else 0;
        and `sampled_reverse_kl`, log p_S - log p_T of the step's unit, divided evenly over its steps, nats; 0 outside
        of all units.
    """
    rows, logp_N = context.signal("teacher"), context.student_logp_N
    inside_N = rows.units.unit_C >= 0
    gap_N = rows.per_step(rows.over_unit(logp_N) - rows.sampled_logp_N)
    return {
        "student_logp": logp_N,
        "student_entropy": context.student_entropy_N,
        _GAP: torch.where(inside_N, gap_N, torch.zeros_like(gap_N)),
        _INSIDE: inside_N.to(logp_N.dtype),
    }


def byte_counts(pack: Pack, lm: LanguageModel) -> Tensor:
    """Bytes of text that each token spells, [N] float64: 0 for stops and other control tokens.

    NaN in completions whose tokenizer does not say which bytes its tokens have.
    """
    found: list[float] = []
    for rollout in pack.rollouts:
        ids: list[int] = rollout.action_ids
        try:
            spelt = pieces(lm.tokenizer, ids, rollout.prefix_ids)
        except SignalError:
            found += [math.nan] * len(ids)
            continue
        table, stops = piece_table(lm.tokenizer, ids), set(lm.stops.ids)
        text = (table.is_text(token) and token not in stops for token in ids)
        found += [float(len(piece)) if is_text else 0.0 for piece, is_text in zip(spelt, text, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def ratios(values: Mapping[str, Tensor], bytes_N: Tensor, *, as_drawn: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """What is summed for each measure, and what the sum is divided by, [N] each.

    The first measure estimates the reverse KL from the tokens that were drawn: the sum of log p_S - log p_T over units,
    divided by their bytes. It may fall below 0, and a stop counts with its log-ratio although it has no bytes. Both
    log-probs are those of the tokens in which each side has the text; other tokens could spell it as well.

    Args:
        values: What `against_units` gives, or the log-probs of one tokenizer: `student_logp` and `teacher_logp`.
        bytes_N: Bytes of each token; steps with NaN are left out.
        as_drawn: Whether the completions were drawn from p_S itself, at temperature 1; else there is no estimate.

    Returns:
        Empty without a teacher. `bytes_in_units` only for a teacher with another tokenizer.
    """
    known_N = ~bytes_N.isnan()
    spelt_N = torch.where(known_N, bytes_N, 0.0)
    if _INSIDE in values:
        inside_N = known_N & values[_INSIDE].bool()
        gap_N = values[_GAP].double()
    elif "teacher_logp" in values:
        inside_N = known_N
        gap_N = values["student_logp"].double() - values["teacher_logp"].double()
    else:
        return {}
    read_N = torch.where(inside_N, spelt_N, 0.0)
    found = {PER_BYTE: (torch.where(inside_N, gap_N, 0.0), read_N)} if as_drawn else {}
    return found | ({IN_UNITS: (read_N, spelt_N)} if _INSIDE in values else {})
