"""How well a score tells right from wrong: AUROC, with intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.evaluate.passk import Estimate, wilson


def auroc(scores: Tensor, right: Tensor) -> float | None:
    """Probability that a right one scores above a wrong one, ties counted as half; None without both kinds.

    Args:
        scores: Any shape [M]; what is not finite is left out.
        right: bool, [M].
    """
    known = scores.isfinite()
    right, scores = right[known], scores[known]
    good, bad = scores[right], scores[~right]
    if not len(good) or not len(bad):
        return None
    order = bad.sort().values
    below = torch.searchsorted(order, good, right=False).double()
    through = torch.searchsorted(order, good, right=True).double()
    return float(((below + through) / 2 / len(bad)).mean())


def clustered_auroc(
    scores: Tensor, right: Tensor, cluster: Sequence[int], *, seed: int = 0, draws: int = 1000
) -> Estimate | None:
    """AUROC with its 95 % bootstrap interval, whole clusters drawn with replacement; None where it is undefined.

    What is observed within a problem is not independent, so problems are what is drawn. Where all draws agree, as they
    do about an AUROC of 0 or 1, Wilson's interval stands instead, for as many observations as there are problems with
    the rarer kind: no AUROC of that value has a larger variance.

    Args:
        scores: [M].
        right: bool, [M].
        cluster: Of each observation.
        seed: Of the draws.
        draws: Resamples; those in which one kind is missing are left out.
    """
    value = auroc(scores, right)
    if value is None:
        return None
    clusters = torch.tensor(cluster)
    members = [(clusters == number).nonzero().squeeze(-1) for number in sorted(set(cluster))]
    draw = torch.Generator().manual_seed(seed)
    found: list[float] = []
    for _ in range(draws):
        chosen = torch.randint(len(members), (len(members),), generator=draw).tolist()
        index = torch.cat([members[number] for number in chosen])
        one = auroc(scores[index], right[index])
        if one is not None:
            found.append(one)
    if not found or min(found) == max(found):
        known = scores.isfinite()
        kinds = [len({cluster[at] for at in (known & (right == kind)).nonzero().flatten().tolist()}) for kind in (0, 1)]
        return Estimate(value, *wilson(value, min(kinds)))
    ends = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Estimate(value, float(ends[0]), float(ends[1]))
