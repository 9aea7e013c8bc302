"""Diagnostics of every run, besides its method's own curves: can this teacher teach this student?

The diagnostics of "Rethinking On-Policy Distillation of LLMs" (arXiv 2604.13016), those of multi-rollout OPD (arXiv
2605.12652), and how far rollout engine and trainer are apart. Axis letters: see `retort.core`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retort.core.rollouts import RIGHT_FROM, Pack
from retort.evaluate.agreement import by_prompt
from retort.evaluate.profile import TURNS
from retort.evaluate.ranks import auroc
from retort.method import Method, Watch
from retort.quantities import (
    entropy_gap,
    overlap_advantage,
    overlap_mass,
    overlap_ratio,
    overlap_teacher_mass,
    teacher_disagreement,
)
from retort.train.storage.metrics import Means

#: Tokens of a position chunk, as in the paper; shorter completions are cut into four.
CHUNK_TOKENS = 1024


def watching(method: Method, k: int, every: int, *, several: bool = False) -> Method:
    """Adds the diagnostics to a method's curves; a name that the method uses already stays its own.

    Args:
        method: The method of the run.
        k: Candidates of either side (the paper: 16); 0 for no diagnostics.
        every: Batches of rollouts from one measurement to the next.
        several: Whether there are several teachers, who may differ.
    """
    views = [name for name, view in method.views.items() if view.model == "teacher"]
    if k == 0 or not views:
        return method
    parts = {
        "overlap_ratio": overlap_ratio(k),
        "overlap_advantage": overlap_advantage(k),
        "overlap_mass": overlap_mass(k),
        "overlap_teacher_mass": overlap_teacher_mass(k),
        "entropy_gap": entropy_gap(),
        **({"teacher_disagreement": teacher_disagreement()} if several else {}),
    }
    taken = {watch.name for watch in method.watch}
    added = [
        Watch(name, part, against=views[0], every=every, by_position=True)
        for name, part in parts.items()
        if name not in taken
    ]
    return replace(method, watch=(*method.watch, *added))


def position_chunks(longest: int) -> list[int]:
    """Where the chunks of a completion begin."""
    size = CHUNK_TOKENS if longest > 2 * CHUNK_TOKENS else math.ceil(longest / 4)
    return list(range(0, longest, size))


def add_positions(means: Means, name: str, values_N: Tensor, position_N: Tensor, longest: int) -> None:
    """The mean of a curve in each position chunk, as `<name>/from-<first token>`."""
    starts = position_chunks(longest)
    for first, end in zip(starts, [*starts[1:], longest], strict=True):
        inside_N = values_N[(position_N >= first) & (position_N < end)].double()
        means.add_sum(f"{name}/from-{first}", float(inside_N.sum()), len(inside_N))


def add_turns(means: Means, name: str, values_N: Tensor, turn_N: Tensor) -> None:
    """The mean of a curve in each turn of episodes, as `<name>/turn-<number from 1>`."""
    number_N = turn_N.clamp(max=TURNS - 1)
    count_K = torch.bincount(number_N)
    sum_K = torch.zeros(len(count_K), dtype=torch.float64, device=values_N.device)
    sum_K.index_add_(0, number_N, values_N.double())
    for turn, (total, count) in enumerate(zip(sum_K.tolist(), count_K.tolist(), strict=True), 1):
        means.add_sum(f"{name}/turn-{turn}", total, count)


def add_noise_floor(means: Means, pack: Pack, rollouts: Sequence[int], student_logp_N: Tensor) -> None:
    """Adds the distance of the trainer's log-probs of generated tokens from the engine's, nats, before any update.

    Smaller divergences are rounding, not disagreement.
    """
    gap_N = engine_gap_N(pack, student_logp_N)[pack.steps_of(rollouts)]
    gap_N = gap_N[gap_N.isfinite()]
    means.add_sum("noise_floor", float(gap_N.sum()), len(gap_N))


def engine_gap_N(pack: Pack, student_logp_N: Tensor) -> Tensor:
    """The distance of each step's log-prob from the engine's, nats, float64, [N]; NaN where no engine reported any."""
    assert pack.steps.engine_logp_N is not None  # A pack always has this column.
    return (student_logp_N - pack.steps.engine_logp_N).abs().double()


def rollout_means(pack: Pack, values_N: Tensor) -> Tensor:
    """The mean over each rollout's steps, [R]."""
    kept_N = values_N.isfinite()
    total_R = torch.zeros(len(pack.rollouts), dtype=torch.float64)
    total_R.index_add_(0, pack.steps.rollout_N[kept_N], values_N[kept_N].double())
    count_R = torch.bincount(pack.steps.rollout_N[kept_N], minlength=len(pack.rollouts))
    return total_R / count_R


def against_rewards(pack: Pack, values: Mapping[str, Tensor], valid_N: Tensor | None = None) -> dict[str, float]:
    """How well the teacher's scores of whole completions agree with their rewards.

    `trajectory_auroc`: how well the mean of log p_T - log p_S tells right from wrong completions, over all rollouts.
    `teacher_signal/<measure>`: how well the mean of log p_T does among the completions of one prompt, averaged over
    prompts with a right and a wrong one. Each is left out where it is undefined.

    Args:
        pack: Rollouts; only those of the student count.
        values: Values of their steps by name, [N] each.
        valid_N: bool, [N]: where the view `teacher` had a context; None for everywhere.
    """
    rewards_R = torch.tensor(
        [r.reward if r.source == "student" and r.reward is not None else math.nan for r in pack.rollouts]
    )
    if "teacher_logp" not in values or bool(rewards_R.isnan().all()):
        return {}
    teacher_N = values["teacher_logp"]
    if valid_N is not None:
        teacher_N = teacher_N.masked_fill(~valid_N, math.nan)
    scores_R = rollout_means(pack, teacher_N)
    found = {f"teacher_signal/{name}": value for name, value in by_prompt(scores_R, rewards_R, pack.group_R).items()}
    means_R = rollout_means(pack, teacher_N - values["student_logp"])
    score = auroc(means_R.masked_fill(rewards_R.isnan(), math.nan), rewards_R >= RIGHT_FROM)
    return found if score is None else {"trajectory_auroc": score, **found}
