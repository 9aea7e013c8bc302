"""The position in a completion after which a teacher cannot teach: the release rule. Axes: see `retort.core`.

In strong-to-weak distillation the later part of a rollout can still show a gap between the models while the teacher no
longer separates the student's own candidates (arXiv 2605.13643). The rule: take the teacher's margin over the student's
top-k, log(1 + its mean) over sentences, find a downward change point by BIC, drop the supervision after it, and spread
a rollout's loss over the tokens that are kept. The formulas come from a reading note that quotes the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.parts import Stat, Weight
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.quantities.margin import Margin, teacher_margin

#: Residuals below this share of the total are rounding errors.
_FLOOR = 1e-12
#: The paper's epsilon, added to residuals.
_EPS = 1e-12


def change_point(
    means: Tensor, *, shortest: int = 3, penalty: int = 3, min_drop: float = 0.0, robust: bool = False
) -> int | None:
    r"""The index at which a sequence drops to a lower level, if BIC prefers two levels to one.

    .. math:: \mathrm{BIC}_0 = n \log((RSS_0 + \epsilon) / n) + \log n, \quad
              \mathrm{BIC}_1(\tau) = n \log((RSS_1(\tau) + \epsilon) / n) + 3 \log n

    over the splits with a higher mean before than after; the best one is returned if its BIC is the smaller.

    Args:
        means: One number per segment, [n].
        shortest: Segments that either side must have; with fewer than twice as many in all there is no change.
        penalty: Parameters of the second model: two means and the split.
        min_drop: Least drop in standard deviations of the sequence; 0 for any. It is not in the paper.
        robust: Whether to winsorise at the 5th and 95th percentile and take medians of three first. Not in the paper.

    Returns:
        Index of the first segment of the lower level, or None.
    """
    x = means.double()
    n = len(x)
    if n < 2 * shortest:
        return None
    if robust:
        x = x.clamp(x.quantile(0.05), x.quantile(0.95))
        x = torch.cat([x[:1], x, x[-1:]]).unfold(0, 3, 1).median(-1).values
    x = x - x.mean()
    whole = float(x.square().sum())
    if whole <= n * (1e-9 * float(means.abs().max())) ** 2:
        return None  # constant, but for rounding
    eps = min(_EPS, _FLOOR * whole)  # for a series of tiny numbers, no more than its own share
    split = torch.arange(shortest, n - shortest + 1)
    before = x.cumsum(0)[split - 1] / split
    after = -x.cumsum(0)[split - 1] / (n - split)  # the whole series sums to 0
    rest = whole - split * before.square() - (n - split) * after.square()
    one = n * torch.log((rest.clamp_min(_FLOOR * whole) + eps) / n) + penalty * math.log(n)
    drop = before - after
    allowed = (drop > 0) & (drop >= min_drop * math.sqrt(whole / n))
    if not bool(allowed.any()):
        return None
    best = int(one.masked_fill(~allowed, math.inf).argmin())
    return int(split[best]) if float(one[best]) < n * math.log((whole + eps) / n) + math.log(n) else None


def release(
    k: int = 4,
    *,
    margin: Margin = "log_gap",
    shortest: int = 3,
    max_segment: int = 128,
    min_drop: float = 0.0,
    robust: bool = False,
    rescale: bool = False,
    name: str = "release",
) -> Weight:
    """1 before the sentence at which the teacher's margin drops for good, 0 from there on; all 1 if it never does.

    It depends on whole rollouts, so it is decided before the first update on a batch.

    Args:
        k: As in `teacher_margin`.
        margin: As in `teacher_margin`, its kind.
        shortest: As in `change_point`.
        max_segment: Tokens of the longest segment; a longer sentence (in code and mathematics) is cut. Where no text is
            known, all segments have this length.
        min_drop: As in `change_point`.
        robust: As in `change_point`.
        rescale: Divide by the share of its rollout's tokens that is kept, so that each rollout keeps its weight.
        name: Name of the stored values: `<name>`, 0 or 1, and with `rescale` `<name>.mass`, the weight.
    """
    if max_segment < 1 or shortest < 1:
        raise UserError(f"max_segment and shortest must be at least 1, not {max_segment} and {shortest}")

    def finish(margin_N: Tensor, steps: Steps, clock: Clock) -> Tensor:
        def find(means: Tensor) -> int | None:
            return change_point(means, shortest=shortest, min_drop=min_drop, robust=robust)

        return kept(margin_N, steps, max_segment, find)

    stat = Stat(name, teacher_margin(k, margin), finish, sentences=True)

    def mass(_: Tensor, steps: Steps, clock: Clock) -> Tensor:
        kept_N, rollouts = steps.stored[name], steps.rollouts()
        share_N = rollouts.mean(kept_N.double())[rollouts.number_N]
        # A rollout without context has no mask, and none of its tokens counts.
        return torch.where(share_N > 0, kept_N.double() / torch.where(share_N > 0, share_N, 1.0), 0.0)

    stats = (stat, Stat(f"{name}.mass", None, mass)) if rescale else (stat,)

    def value(context: Context, view: str) -> Tensor:
        return context.steps.stored[stats[-1].name].to(context.student_logp_N.dtype)

    return Weight(f"{name}({margin}, top-{k})", value, stats=stats)


def kept(margin_N: Tensor, steps: Steps, max_segment: int, find: Callable[[Tensor], int | None]) -> Tensor:
    """The mask of `release`, [N]: 1...1 0...0 in every rollout, cut at a segment's border."""
    mask_N = torch.ones_like(margin_N)
    order_N = torch.argsort(steps.rollout_N, stable=True)
    ends = torch.bincount(steps.rollout_N).cumsum(0)
    for rows_A in torch.tensor_split(order_N, ends[:-1].cpu()):
        if not len(rows_A):
            continue
        sentence_N = steps.turn_N if steps.sentence_N is None else steps.sentence_N  # a turn ends a sentence
        sentence_A = None if sentence_N is None else sentence_N[rows_A]
        segment_A = segments(len(rows_A), sentence_A, max_segment).to(margin_N.device)
        count = int(segment_A[-1]) + 1
        total = torch.zeros(count, dtype=torch.float64, device=margin_N.device)
        total.index_add_(0, segment_A, margin_N[rows_A].double())
        found = find(torch.log1p(total / torch.bincount(segment_A, minlength=count)))
        if found is not None:
            mask_N[rows_A] = (segment_A < found).to(mask_N.dtype)
    return mask_N


def segments(steps: int, sentence_A: Tensor | None, longest: int) -> Tensor:
    """The segment of each step, [A] from 0: its sentence, cut where that is longer than `longest` tokens."""
    if sentence_A is None:
        sentence_A = torch.zeros(steps, dtype=torch.long)
    sentence_A = sentence_A.cpu()
    starts_A = torch.ones(steps, dtype=torch.bool)
    starts_A[1:] = sentence_A[1:] != sentence_A[:-1]
    index_A = torch.arange(steps)
    first_A = torch.where(starts_A, index_A, torch.zeros_like(index_A)).cummax(0).values
    starts_A |= (index_A - first_A) % longest == 0
    return starts_A.long().cumsum(0) - 1
